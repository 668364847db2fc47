"""Loading of training images: a detector's mapper in one thread, or a classifier's whole loader.

By default, our mapper and Detectron2's load images with masks. With ``--classifier``, a
classifier's loader with workers makes batches with one tensor of images, or lists of images as
Detectron2's loaders do; the time that the main thread needs to move a batch to the device is also
measured, because meanwhile it starts no other work there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data.build import trivial_batch_collator
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.timing import alternate, print_ratios
from contnet.config import add_contnet_config
from contnet.data.pipeline.loader import build_train_loader
from contnet.data.pipeline.mappers import FastMapper
from contnet.modeling.image_batch import ImageBatch
from contnet.utils.cpus import available_cpus
from contnet.utils.errors import UserError
from contnet.utils.processes import raise_open_files
from contnet.utils.seed import seed_everything

__all__ = ["add_arguments", "run"]

HEIGHT, WIDTH = 480, 640


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", metavar="FOLDER", help="image folder (default: drawn images)")
    parser.add_argument("--annotations", metavar="JSON", help="annotations in COCO format")
    parser.add_argument("--number", type=int, default=30, metavar="N", help="number of images")
    parser.add_argument("--size", type=int, default=800, help="shorter side in pixels")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="timed passes of each")
    own = parser.add_argument_group("a classifier's loader")
    own.add_argument("--classifier", action="store_true", help="measure a classifier's loader")
    own.add_argument("--batch", type=int, default=128, metavar="N", help="batch size")
    own.add_argument("--batches", type=int, default=40, metavar="N", help="batches per timed pass")
    own.add_argument("--workers", type=int, default=available_cpus(), metavar="N")


def _draw(rng: np.random.Generator) -> Image.Image:
    """Draws colours, edges and noise at all scales; its JPEG is as large as a photograph's."""
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
    """Draws seven polygons with 40 corners."""
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


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _to_device(batch: Sequence[dict]) -> None:
    """Moves a batch to the device as a model does."""
    device = _device()
    if isinstance(batch, ImageBatch):
        batch.images.to(device, non_blocking=True)
    else:
        torch.stack([each["image"] for each in batch]).to(device)


def _build_loaders(args: argparse.Namespace, records: Sequence[dict]) -> dict[str, DataLoader]:
    """Builds a classifier's loaders with Detectron2's way of collating and with ours."""
    cfg = get_cfg()
    add_contnet_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
    cfg.MODEL.DEVICE = _device()
    cfg.SOLVER.IMS_PER_BATCH = args.batch
    cfg.DATALOADER.NUM_WORKERS = args.workers
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    labelled = [{"file_name": each["file_name"], "label": 0} for each in records]
    loaders = {name: build_train_loader(cfg, labelled, seed=0) for name in ("list", "one tensor")}
    loaders["list"].collate_fn, loaders["list"].pin_memory = trivial_batch_collator, False
    return loaders


def _time_batches(loader: DataLoader, number: int) -> tuple[float, float]:
    """Returns the seconds for ``number`` batches, and the main thread's CPU seconds in them."""
    batches = iter(loader)
    for batch in itertools.islice(batches, loader.num_workers + 1):  # until all workers are busy
        _to_device(batch)
    start, busy = time.perf_counter(), time.thread_time()
    for batch in itertools.islice(batches, number):
        _to_device(batch)
    return time.perf_counter() - start, time.thread_time() - busy


def _run_classifier(args: argparse.Namespace, records: Sequence[dict]) -> None:
    raise_open_files()
    loaders = _build_loaders(args, records)
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    busy: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(args.rounds):
        # One after the other, because the workers of both would compete for the cores.
        for name, loader in loaders.items():
            whole, at_work = _time_batches(loader, args.batches)
            seconds[name].append(whole)
            busy[name].append(at_work)
    print_ratios(seconds, "list")
    for name in loaders:
        speed = args.batches * args.batch / median(seconds[name])
        each = 1e3 * median(busy[name]) / args.batches
        print(f"{name}: {speed:.1f} images/s, {each:.2f} ms of the main thread per batch")


def _run_mappers(args: argparse.Namespace, records: Sequence[dict]) -> None:
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

    ways = {name: lambda m=mapper: load_all(m) for name, mapper in mappers.items()}
    seconds = alternate(ways, args.rounds)
    theirs, ours = (way() for way in ways.values())
    print_ratios(seconds, "Detectron2")
    for name, times in seconds.items():
        print(f"{name}: {len(records) / median(times):.1f} images/s")
    pairs = zip(theirs, ours, strict=True)
    differences = [(a["image"].int() - b["image"].int()).abs() for a, b in pairs]
    share = sum((each > 0).sum().item() for each in differences) / sum(
        map(torch.numel, differences)
    )
    greatest = max(each.max().item() for each in differences)
    print(f"largest difference of a value {greatest}, in {1e5 * share:.1f} in 100,000 values")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.images or args.annotations:
            records = _read_records(args)
        else:
            records = _draw_records(Path(folder), args.number)
        print(_describe(records))
        measure = _run_classifier if args.classifier else _run_mappers
        measure(args, records)
