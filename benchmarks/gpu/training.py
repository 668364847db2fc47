"""Trains and evaluates every system on drawn shapes, and resumes a training run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import distributed

from benchmarks.gpu.part import Part
from benchmarks.step import build_step
from contnet.checkpoint.names import LAST_CHECKPOINT, numbered_name
from contnet.data.datasets.shapes import crop_shapes, make_shapes, shapes_datasets
from contnet.data.datasets.shapes_cityscapes import shapes_to_cityscapes
from contnet.engine.writers import read_metrics
from contnet.evaluation.results import read_results
from contnet.launch.main import train
from contnet.launch.preflight_config import load_checked_config

__all__ = ["PRECISIONS", "process_group", "train_and_resume", "train_systems"]

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# A learning rate at which random weights with frozen norms stay finite.
_TRAINING = "SEED 1 LOG_PERIOD 1 SOLVER.BASE_LR 0.0005 SOLVER.STEPS () SOLVER.WARMUP_ITERS 1"
_ON_GPU = "SOLVER.IMS_PER_BATCH 4 DATALOADER.NUM_WORKERS 4"
_ON_CPU = "SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0"
# Keys for short iterations on a CPU, by the start of a config's name; the last: other detectors.
_SMALL = {
    "cityscapes/pspnet": """
        INPUT.MIN_SIZE_TRAIN (96,160) INPUT.CROP.SIZE (64,96) INPUT.MIN_SIZE_TEST 96
        INPUT.MAX_SIZE_TEST 160 MODEL.SEM_SEG_HEAD.CONVS_DIM 32
        """,
    "imagenet/": """
        INPUT.CLASSIFIER.SIZE 64 INPUT.CLASSIFIER.RESIZE_TEST 64 INPUT.CLASSIFIER.CROP_TEST 64
        """,
    # In bfloat16 on a CPU, the gradient of a convolution at stride 2 on one pixel, as on the top
    # level of a smaller image, is garbage.
    "fcos": """
        INPUT.MIN_SIZE_TRAIN (96,) INPUT.MAX_SIZE_TRAIN 128 INPUT.MIN_SIZE_TEST 64
        INPUT.MAX_SIZE_TEST 96 MODEL.FPN.OUT_CHANNELS 64
        """,
    "": """
        INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 96 INPUT.MIN_SIZE_TEST 64
        INPUT.MAX_SIZE_TEST 96 MODEL.FPN.OUT_CHANNELS 64 MODEL.ROI_BOX_HEAD.FC_DIM 32
        MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.POST_NMS_TOPK_TRAIN 20
        MODEL.RPN.PRE_NMS_TOPK_TEST 50 MODEL.RPN.POST_NMS_TOPK_TEST 20
        MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.ROI_MASK_HEAD.CONV_DIM 16
        """,
}
PRECISIONS = {
    "fp32": (),
    "bf16": ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"),
    "fp16": ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16"),
}
_TTA = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES")
# Systems besides Faster R-CNN: name, config, precision, and whether with test-time augmentation.
_SYSTEMS = (
    ("mask_rcnn", "mask_rcnn_contti", "fp32", False),
    ("retinanet", "retinanet_contti", "fp32", False),
    ("fcos", "fcos_contti", "fp32", False),
    ("pspnet", "cityscapes/pspnet_contti", "fp32", False),
    ("cityscapes_mask_rcnn", "cityscapes/mask_rcnn_contti", "fp32", False),
    ("classifier", "imagenet/contti", "fp32", False),
    ("mask_rcnn with TTA", "mask_rcnn_contti", "bf16", True),
    ("fcos with TTA", "fcos_contti", "bf16", True),
)


def _draw(part: Part) -> Path:
    numbers = {"num_train": 32, "num_val": 8, "min_side": 400, "max_side": 560}
    if not part.on_gpu:
        numbers = {"num_train": 4, "num_val": 2, "min_side": 128, "max_side": 160}
    return make_shapes(part.output / part.name / "shapes", **numbers)


def _register(part: Part, shapes: Path, config: str) -> list[str]:
    """Returns the config keys of the shapes, in the format of a config's data set."""
    if config.startswith("cityscapes/"):  # Detectron2's names, under DETECTRON2_DATASETS
        folder = Path(os.environ["DETECTRON2_DATASETS"])
        if not folder.exists():
            shapes_to_cityscapes(shapes, folder)
        return []
    prefix, sets = "shapes", shapes_datasets(shapes)
    if config.startswith("imagenet/"):
        prefix, folder = "crops", part.output / part.name / "crops"
        crop_shapes(shapes, folder)
        sets = [[f"crops_{split}", str(folder / split)] for split in ("train", "val")]
    train_set, test_set = f"('{prefix}_train',)", f"('{prefix}_val',)"
    return [
        *("DATASETS.REGISTER", str(sets)),
        *("DATASETS.TRAIN", train_set, "DATASETS.TEST", test_set),
    ]


def _trainer(part: Part, shapes: Path, config: str, iterations: int) -> Callable[..., dict]:
    """Returns a function that trains in a subfolder, evaluates and returns the results."""
    own = _ON_GPU
    if not part.on_gpu:
        own = _ON_CPU + next(_SMALL[start] for start in _SMALL if config.startswith(start))
    options = [*_TRAINING.split(), *own.split(), *_register(part, shapes, config)]
    options += ["MODEL.DEVICE", part.device, "SOLVER.MAX_ITER", str(iterations)]

    def call(name: str, *more: str) -> dict:
        folder = part.output / part.name / name
        if part.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = ["--config-file", str(_CONFIGS / f"{config}.yaml")]
        train([*start, *options, "OUTPUT_DIR", str(folder), *more])
        return _figures(folder)

    return call


def _figures(folder: Path) -> dict:
    steps = [line for line in read_metrics(folder) if "total_loss" in line]
    metrics = read_results(str(folder))[-1]["metrics"]
    times = [line["time"] for line in steps if "time" in line]  # missing for the first iterations
    losses = [line["total_loss"] for line in steps]
    return {
        "losses": losses,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "seconds_per_iteration": median(times) if times else None,
        "peak_mb": max(line.get("gpu_memory_mb", 0) for line in steps) or None,
        "metrics": {
            f"{task}/{key}": value
            for task, values in metrics.items()
            for key, value in values.items()
            if "-" not in key  # metrics of a class
        },
    }


def train_and_resume(part: Part) -> None:
    """Trains Faster R-CNN, and then resumes it from the checkpoint in the middle."""
    config, half = ("faster_rcnn_contm", 20) if part.on_gpu else ("faster_rcnn_contti", 1)
    shapes = _draw(part)
    train_faster = _trainer(part, shapes, config, 2 * half)
    for precision, own in PRECISIONS.items():
        options = (*own, "SOLVER.CHECKPOINT_PERIOD", str(half))
        row = {"precision": precision, "iterations": 2 * half}
        folders = [part.output / part.name / f"{precision}_{run}" for run in ("whole", "resumed")]
        with part.fence("faster_rcnn", run="uninterrupted", **row):
            whole = train_faster(folders[0].name, *options)
            part.record("faster_rcnn", run="uninterrupted", **row, **whole)
            with part.fence("faster_rcnn", run="resumed", **row):
                _copy_checkpoint(*folders, f"{numbered_name(half - 1)}.pth")
                resumed = train_faster(folders[1].name, *options, "--resume")
                pairs = zip(whole["losses"][half:], resumed["losses"], strict=True)
                differences = [abs(again / loss - 1) for loss, again in pairs]
                # A GPU adds in any order: only the first loss does not depend on resumed steps.
                part.record(
                    "faster_rcnn",
                    run="resumed",
                    **row,
                    **resumed,
                    first_difference=differences[0],
                    largest_difference=max(differences),
                )
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _copy_checkpoint(whole: Path, resumed: Path, checkpoint: str) -> None:
    resumed.mkdir()
    shutil.copy(whole / checkpoint, resumed)
    (resumed / LAST_CHECKPOINT).write_text(checkpoint)


def train_systems(part: Part) -> None:
    """Briefly trains and evaluates the other systems, test-time augmentation and SyncBN."""
    shapes = _draw(part)
    sizes = "(400,800)" if part.on_gpu else "(64,96)"
    for number, (name, config, precision, tta) in enumerate(_SYSTEMS):
        with part.fence("systems", system=name, precision=precision):
            call = _trainer(part, shapes, config, 5 if part.on_gpu else 2)
            options = [*PRECISIONS[precision], *([*_TTA, sizes] if tta else [])]
            figures = call(f"run_{number}", *options)
            part.record("systems", system=name, precision=precision, **figures)
    with part.fence("systems", system="faster_rcnn with SyncBN", precision="bf16"):
        _train_sync_bn(part)


@contextmanager
def process_group(part: Part) -> Iterator[str]:
    """Makes a process group of only this process, with NCCL (gloo on a CPU)."""
    backend = "nccl" if part.on_gpu else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield backend
    finally:
        distributed.destroy_process_group()


def _train_sync_bn(part: Part) -> None:
    """Trains with SyncBN in a group of one process; a CPU uses Detectron2's slower SyncBN."""
    opts = ["MODEL.DEVICE", part.device, "MODEL.CONTNET.NORM", "SyncBN", *PRECISIONS["bf16"]]
    size = (480, 640) if part.on_gpu else (64, 96)
    if not part.on_gpu:
        opts += _SMALL[""].split()
    with process_group(part) as backend:
        cfg = load_checked_config(str(_CONFIGS / "faster_rcnn_contti.yaml"), opts)
        _, _, step = build_step(cfg, 2, size)
        for _ in range(5 if part.on_gpu else 1):
            step()
        part.synchronize()
    part.record("systems", system="faster_rcnn with SyncBN", precision="bf16", backend=backend)
