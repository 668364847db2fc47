"""Evaluation of detections on COCO against Detectron2's evaluator on pycocotools."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = ["add_arguments", "make_detections", "make_truth", "run"]

HEIGHT, WIDTH = 480, 640
CLASSES = 80
DETECTIONS = 100
_CORNERS = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=5000, metavar="N")
    parser.add_argument("--masks", action="store_true", help="measure masks instead of boxes")
    parser.add_argument("--seed", type=int, default=0)


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """XYWH (count, 4) inside the image, as many small ones as large ones."""
    sizes = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
    places = rng.uniform(size=(count, 2)) * (np.array([WIDTH, HEIGHT]) - sizes)
    return np.concatenate([places, sizes], axis=1)


def _outline(rng: np.random.Generator, box: np.ndarray) -> list[float]:
    """A polygon in a box, as COCO writes it."""
    angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    radii = rng.uniform(0.35, 0.5, _CORNERS)
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None] + 0.5
    return (box[:2] + around * box[2:]).round(2).ravel().tolist()


def make_truth(images: int, seed: int) -> dict:
    """The content of an annotation file: seven objects in an image on average, 1 in 50 a crowd."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image in range(1, images + 1):
        for box in _boxes(rng, rng.poisson(7)):
            outline = _outline(rng, box)
            crowd = bool(rng.random() < 0.02)
            segmentation = rle.merge(rle.frPyObjects([outline], HEIGHT, WIDTH))
            area = float(rle.area(segmentation))
            segmentation["counts"] = segmentation["counts"].decode()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(rng.integers(1, CLASSES + 1)),
                    "bbox": box.round(2).tolist(),
                    "area": area,
                    "iscrowd": int(crowd),
                    "segmentation": segmentation if crowd else [outline],
                }
            )
    return {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)],
    }
