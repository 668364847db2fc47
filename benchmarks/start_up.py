"""Start of a run with annotations like COCO's and Cityscapes', and with Detectron2's loader."""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets.builtin import register_all_cityscapes
from detectron2.utils import comm
from torch import distributed, multiprocessing

from contnet.config import add_contnet_config
from contnet.data.datasets.register import register_datasets
from contnet.data.pipeline.annotations import cache_cityscapes, load_dataset_dicts
from contnet.data.pipeline.records import Records
from contnet.data.validation.examine import examine_cityscapes, examine_coco

__all__ = ["add_arguments", "draw_cityscapes", "draw_coco", "run"]

_SHAPES = 4000  # number of different polygons, shared by objects
_NAME = "drawn"
_SCENES = "cityscapes_fine_instance_seg_train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=118_000, metavar="N", help="COCO images")
    parser.add_argument("--objects", type=int, default=860_000, metavar="N", help="objects in them")
    parser.add_argument(
        "--processes", type=int, nargs="*", default=(1, 8), metavar="N", help="ranks on one node"
    )
    parser.add_argument(
        "--detectron2",
        type=int,
        nargs="*",
        default=(1, 2),
        metavar="N",
        help="processes for Detectron2's loader, which needs much memory",
    )
    parser.add_argument("--scenes", type=int, default=2975, metavar="N", help="Cityscapes scenes")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="folder for the drawn files")


# --- drawn annotations ---------------------------------------------------------------------------


def _outline(rng: np.random.Generator, points: int, width: float, height: float) -> np.ndarray:
    """Draws an irregular closed outline (points, 2) within an image."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, points))
    radii = rng.uniform(0.7, 1, points) * rng.uniform(0.02, 0.2)
    circle = np.stack([np.cos(angles) * width, np.sin(angles) * height], axis=1)
    return circle * radii[:, None] + rng.uniform(0.2, 0.8, 2) * [width, height]


def _coco_objects(rng: np.random.Generator) -> list[str]:
    """Makes COCO objects as JSON text, without ids and the closing bracket."""
    texts = []
    for _ in range(_SHAPES):
        outline = _outline(rng, int(rng.integers(8, 48)), 640, 480)
        x, y = outline.min(axis=0)
        width, height = outline.max(axis=0) - (x, y)
        item = {
            "segmentation": [[round(value, 2) for value in outline.ravel().tolist()]],
            "area": round(width * height * 0.6, 4),
            "iscrowd": 0,
            "bbox": [round(value, 2) for value in (x, y, width, height)],
            "category_id": int(rng.integers(1, 81)),
        }
        texts.append(json.dumps(item, separators=(",", ":"))[:-1])
    return texts


def draw_coco(file: Path, images: int, objects: int) -> None:
    """Writes an annotation file like that of COCO 2017, with one in a hundred images empty."""
    rng = np.random.default_rng(0)
    shapes = _coco_objects(rng)
    owners = rng.integers(0, images, objects)
    owners += owners % 100 == 0
    records = [
        {"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480 + 200 * (i % 3)}
        for i in range(1, images + 1)
    ]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    with open(file, "w") as target:
        start = json.dumps({"images": records, "categories": categories})
        target.write(start[:-1] + ',"annotations":[')
        for number, owner in enumerate(np.minimum(owners, images - 1).tolist()):
            shape = shapes[number % len(shapes)]
            comma = "," if number else ""
            target.write(f'{comma}{shape},"image_id":{owner + 1},"id":{number + 1}}}\n')
        target.write("]}")


def _scene(rng: np.random.Generator) -> list[dict]:
    """Draws about as many polygons and points as in a Cityscapes scene."""
    labels = ["road", "building", "vegetation", "sky", "pole", "traffic sign", "car", "person"]
    objects = []
    for number in range(50):
        outline = _outline(rng, int(rng.integers(10, 60)), 2048, 1024)
        polygon = outline.round().astype(int).tolist()
        objects.append({"label": labels[number % len(labels)], "polygon": polygon})
    return objects


def draw_cityscapes(root: Path, scenes: int) -> None:
    """Writes ``root/cityscapes`` with the polygons of a training split and empty other files."""
    rng = np.random.default_rng(0)
    for number in range(scenes):
        city, name = f"city{number % 18}", f"city{number % 18}_{number:06d}_000019"
        image = root / "cityscapes" / "leftImg8bit" / "train" / city / f"{name}_leftImg8bit.png"
        labels = root / "cityscapes" / "gtFine" / "train" / city / f"{name}_gtFine_"
        for folder in (image.parent, labels.parent):
            folder.mkdir(parents=True, exist_ok=True)
        for path in (image, f"{labels}instanceIds.png", f"{labels}labelIds.png"):
            Path(path).touch()
        content = {"imgHeight": 1024, "imgWidth": 2048, "objects": _scene(rng)}
        Path(f"{labels}polygons.json").write_text(json.dumps(content))


# --- one rank ------------------------------------------------------------------------------------


def _count_parses(counts: list[int]) -> None:
    """Makes this process count its calls of ``json.load``."""
    plain = json.load

    def counted(*args, **kwargs):
        counts[0] += 1
        return plain(*args, **kwargs)

    json.load = counted


def _pss() -> int:
    """Returns the bytes of this process's memory, with its share of memory that processes share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _load(cfg: CfgNode, ours: bool) -> Records | DatasetFromList:
    """Loads the data set as a rank of a run does."""
    if ours:
        return load_dataset_dicts(cfg, cfg.DATASETS.TRAIN, train=True)
    return DatasetFromList(get_detection_dataset_dicts(cfg.DATASETS.TRAIN), copy=False)


def _rank(rank: int, processes: int, cfg: CfgNode, ours: bool, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    comm.create_local_process_group(processes)
    register_datasets(cfg)
    parses = [0]
    _count_parses(parses)
    comm.synchronize()
    before = _pss()
    comm.synchronize()
    start = time.perf_counter()
    if ours and rank == 0:
        examine_coco(cfg, _NAME)
    comm.synchronize()
    checked = time.perf_counter()
    dicts = _load(cfg, ours)
    loaded = time.perf_counter()
    for index in range(len(dicts)):
        dicts[index]
    comm.synchronize()
    result = {
        "checks": checked - start,
        "call": loaded - checked,
        "parses": parses[0],
        "added": _pss() - before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    comm.synchronize()
    Path(folder, f"{rank}.json").write_text(json.dumps(result))


def _start(cfg: CfgNode, processes: int, ours: bool, title: str) -> int:
    """Starts ranks and prints their time and memory; returns the memory that they added, in bytes.

    The memory is measured after all ranks have read all records.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (processes, cfg, ours, folder), nprocs=processes)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    most = {key: max(each[key] for each in found) for key in ("checks", "call", "peak")}
    parses, added = (sum(each[key] for each in found) for key in ("parses", "added"))
    print(
        f"{title:23} {processes} processes  checks {most['checks']:6.2f} s  data set call "
        f"{most['call']:6.2f} s  {parses} parses  {added / 2**20:7.1f} MiB added  largest process "
        f"{most['peak'] / 2**20:7.1f} MiB",
        flush=True,
    )
    return added


# --- all measurements ----------------------------------------------------------------------------


def _config(folder: Path, name: str) -> CfgNode:
    cfg = get_cfg()
    add_contnet_config(cfg)
    cfg.DATASETS.REGISTER = [[_NAME, str(folder / "drawn.json"), str(folder)]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
    cfg.DATASETS.CACHE_DIR = str(folder / "cache")
    return cfg


def _forget(cfg: CfgNode) -> None:
    for path in Path(cfg.DATASETS.CACHE_DIR).glob("*"):
        path.unlink()


def _measure_coco(args: argparse.Namespace, folder: Path) -> None:
    file = folder / "drawn.json"
    draw_coco(file, args.images, args.objects)
    print(f"{args.images} images, {args.objects} objects, {file.stat().st_size / 2**20:.0f} MiB")
    cfg = _config(folder, _NAME)
    added = []
    for processes in args.processes:
        _forget(cfg)
        _start(cfg, processes, True, "first start")
        added.append(_start(cfg, processes, True, "second start"))
        (kept,) = Path(cfg.DATASETS.CACHE_DIR).glob("*.records")
        print(f"kept records: {kept.stat().st_size / 2**20:.0f} MiB")
        print(f"memory added by {processes} processes: {added[-1] / added[0]:.2f} x the first's")
    for processes in args.detectron2:
        _start(cfg, processes, False, "Detectron2, every start")


def _times(cfg: CfgNode) -> Iterator[tuple[str, float]]:
    """Yields the seconds of each part of a start with Cityscapes polygons."""
    parts = {
        "checks": partial(examine_cityscapes, cfg, _SCENES),
        "reading": partial(cache_cityscapes, cfg, [_SCENES]),
        "data set call": partial(load_dataset_dicts, cfg, [_SCENES], train=True),
    }
    for name, part in parts.items():
        start = time.perf_counter()
        part()
        yield name, time.perf_counter() - start


def _measure_cityscapes(args: argparse.Namespace, folder: Path) -> None:
    draw_cityscapes(folder, args.scenes)
    for name in DatasetCatalog.list():
        if name.startswith("cityscapes_fine_"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    register_all_cityscapes(str(folder))
    cfg = _config(folder, _SCENES)
    for title in ("first start", "second start"):
        times = dict(_times(cfg))
        parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())
        print(f"{args.scenes} scenes, {title}: {sum(times.values()):.2f} s ({parts})", flush=True)
    start = time.perf_counter()
    get_detection_dataset_dicts(_SCENES)
    print(f"Detectron2, every start: {time.perf_counter() - start:.2f} s", flush=True)


def run(args: argparse.Namespace) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # spawned processes need no GPU
    with tempfile.TemporaryDirectory(prefix="start_up_", dir=args.folder) as folder:
        if args.images:
            _measure_coco(args, Path(folder))
        if args.scenes:
            _measure_cityscapes(args, Path(folder))
