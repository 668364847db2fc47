"""Images to compare an export on: given images, the model's test set, or drawn images."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from PIL import Image
from torch import Tensor

from contnet.data.datasets.image_files import IMAGE_ENDINGS
from contnet.data.datasets.register import find_source, register_datasets
from contnet.data.datasets.shapes_drawing import draw_picture
from contnet.prediction.predictor import Predictor

__all__ = ["prepare_images"]

_SIDES = (200, 400)  # minimum and maximum side of drawn pictures, in pixels


def _walk(folder: str) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(IMAGE_ENDINGS):
                yield Path(root, name)


def _test_images(cfg: CfgNode) -> Iterator[Path]:
    """Yields the image files of the test sets that exist."""
    register_datasets(cfg)
    for name in cfg.DATASETS.TEST:
        source = find_source(name)
        folder = getattr(source, "image_dir", "") or getattr(source, "image_root", "")
        if folder:
            yield from _walk(folder)


def prepare_images(
    predictor: Predictor, paths: Sequence[Path], count: int
) -> tuple[list[Tensor], str]:
    """Prepares real images for the model.

    Args:
        predictor: its mapper reads and resizes the images.
        paths: paths of given images.
        count: number of images to choose if none are given.

    Returns:
        Batches of one image, float (1, 3, H, W), and a description of their source.

    Raises:
        UserError: if an image cannot be read.
    """
    what, records = "given images", [{"file_name": str(path)} for path in paths]
    if not records:
        found = itertools.islice(_test_images(predictor.cfg), count)
        what, records = "images of the test set", [{"file_name": str(path)} for path in found]
    if not records:
        rng = np.random.default_rng(0)
        pictures: list[Image.Image] = [draw_picture(rng, *_SIDES)[0] for _ in range(count)]
        what = "drawn images"
        records = [{"file_name": f"drawing {i}", "pixels": p} for i, p in enumerate(pictures)]
    return [predictor.mapper(record)["image"][None].float() for record in records], what
