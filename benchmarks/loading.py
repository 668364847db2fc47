"""Loading of training images with masks against Detectron2's mapper, in one thread."""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from PIL import Image

from benchmarks.timing import alternate, print_ratios
from contnet.config import add_contnet_config
from contnet.data.pipeline.mappers import FastMapper
from contnet.utils.errors import UserError
from contnet.utils.seed import seed_everything

__all__ = ["add_arguments", "run"]

HEIGHT, WIDTH = 480, 640


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", metavar="FOLDER", help="instead of drawn ones")
    parser.add_argument("--annotations", metavar="JSON", help="of these images, in COCO's format")
    parser.add_argument("--number", type=int, default=30, metavar="N", help="of images")
    parser.add_argument("--size", type=int, default=800, help="of the shorter side, in pixels")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="timed passes of each")


def _draw(rng: np.random.Generator) -> Image.Image:
    """Colours, edges and grain of all sizes: as many bytes in JPEG as a photograph."""
    picture = np.full((HEIGHT, WIDTH, 3), 128.0)
    for size in (4, 8, 16, 32, 64, 128, 256):
        noise = rng.normal(scale=90 / size**0.6, size=(size * 3 // 4, size, 3)).astype(np.float32)
        picture += cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
    for _ in range(40):
        corners = rng.integers(0, (WIDTH, HEIGHT), (3, 2))
        colour = rng.uniform(0, 255, 3).tolist()
        cv2.fillPoly(picture, [corners // [1, 1] + rng.integers(-40, 40, (3, 2))], colour)
    picture += rng.normal(scale=5, size=picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _draw_objects(rng: np.random.Generator) -> list[dict]:
    """Seven polygons of 40 corners."""
    objects = []
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    for _ in range(7):
        radii = rng.uniform(10, 100) * rng.uniform(0.7, 1, (40, 1))
        around = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii
        corners = (rng.uniform((0, 0), (WIDTH, HEIGHT)) + around).clip(0, (WIDTH, HEIGHT)).round(2)
        low, high = corners.min(axis=0), corners.max(axis=0)
        objects.append(
            {
                "bbox": [*low.tolist(), *(high - low).tolist()],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": int(rng.integers(80)),
                "iscrowd": 0,
                "segmentation": [corners.ravel().tolist()],
            }
        )
    return objects


def _draw_records(folder: Path, number: int) -> list[dict]:
    rng = np.random.default_rng(0)
    records = []
    for i in range(number):
        path = folder / f"{i}.jpg"
        _draw(rng).save(path, quality=90)
        records.append(
            {
                "file_name": str(path),
                "image_id": i,
                "height": HEIGHT,
                "width": WIDTH,
                "annotations": _draw_objects(rng),
            }
        )
    return records


def _read_records(args: argparse.Namespace) -> list[dict]:
    for path in (args.images, args.annotations):
        if not path or not Path(path).exists():
            raise UserError(f"{path} does not exist: --images and --annotations go together")
    with contextlib.redirect_stdout(io.StringIO()):
        records = load_coco_json(args.annotations, args.images)
    return records[: args.number]


def _describe(records: Sequence[dict]) -> str:
    size = median(Path(each["file_name"]).stat().st_size for each in records) / 1000
    objects = sum(len(each["annotations"]) for each in records) / len(records)
    return f"{len(records)} images of {size:.0f} kB, {objects:.1f} objects each (median and mean)"


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    cfg = get_cfg()
    add_contnet_config(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN = (args.size,)
    mappers = {"Detectron2": DatasetMapper(cfg), "ours": FastMapper(cfg)}

    def load_all(mapper: DatasetMapper) -> list[dict]:
        loaded = []
        for i, record in enumerate(records):
            seed_everything(0, i)
            loaded.append(mapper(record))
        return loaded

    with tempfile.TemporaryDirectory() as folder:
        if args.images or args.annotations:
            records = _read_records(args)
        else:
            records = _draw_records(Path(folder), args.number)
        print(_describe(records))
        ways = {name: lambda m=mapper: load_all(m) for name, mapper in mappers.items()}
        seconds = alternate(ways, args.rounds)
        theirs, ours = (way() for way in ways.values())
    print_ratios(seconds, "Detectron2")
    for name, times in seconds.items():
        print(f"{name}: {len(records) / median(times):.1f} images a second")
    pairs = zip(theirs, ours, strict=True)
    differences = [(a["image"].int() - b["image"].int()).abs() for a, b in pairs]
    share = sum((each > 0).sum().item() for each in differences) / sum(
        map(torch.numel, differences)
    )
    greatest = max(each.max().item() for each in differences)
    print(f"greatest difference of a value {greatest}, of {1e5 * share:.1f} in 100,000 values")
