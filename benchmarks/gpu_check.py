"""The parts of tools/gpu_check.sh: what a GPU is checked for, each in a process of its own."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import detectron2
import numpy
import timm
import torch
import torchvision
from torch import Tensor

import contnet
from benchmarks.plain import run_plain
from benchmarks.timing import alternate
from contnet.checkpoint.names import LAST_CHECKPOINT, numbered_name
from contnet.data.datasets.shapes import crop_shapes, make_shapes, shapes_datasets
from contnet.data.datasets.shapes_cityscapes import shapes_to_cityscapes
from contnet.engine.run_record import git_commit
from contnet.engine.writers import read_metrics
from contnet.evaluation.results import read_results
from contnet.utils.errors import UserError, print_error

__all__ = ["PARTS", "main"]

_REPOSITORY = Path(__file__).resolve().parents[1]
# A rate that random weights stand with frozen norms.
_TRAINING = "SEED 1 LOG_PERIOD 1 SOLVER.BASE_LR 0.0005 SOLVER.STEPS () SOLVER.WARMUP_ITERS 1"
_ON_GPU = "SOLVER.IMS_PER_BATCH 8 DATALOADER.NUM_WORKERS 8"
_ON_CPU = "SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0"
# What makes an iteration short on a CPU, by the start of a config's name; the others are detectors.
_SMALL = {
    "cityscapes/pspnet": """
        INPUT.MIN_SIZE_TRAIN (96,160) INPUT.CROP.SIZE (64,96) INPUT.MIN_SIZE_TEST 96
        INPUT.MAX_SIZE_TEST 160 MODEL.SEM_SEG_HEAD.CONVS_DIM 32
        """,
    "imagenet/": """
        INPUT.CLASSIFIER.SIZE 64 INPUT.CLASSIFIER.RESIZE_TEST 64 INPUT.CLASSIFIER.CROP_TEST 64
        """,
    "": """
        INPUT.MIN_SIZE_TRAIN (96,) INPUT.MAX_SIZE_TRAIN 160 INPUT.MIN_SIZE_TEST 96
        INPUT.MAX_SIZE_TEST 160 MODEL.FPN.OUT_CHANNELS 64
        """,
}
# Besides Faster R-CNN.
_SYSTEMS = {
    "mask_rcnn": "mask_rcnn_contti",
    "retinanet": "retinanet_contti",
    "fcos": "fcos_contti",
    "pspnet": "cityscapes/pspnet_contti",
    "cityscapes_mask_rcnn": "cityscapes/mask_rcnn_contti",
    "classifier": "imagenet/contti",
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _record(args: argparse.Namespace, figures: dict) -> None:
    """Adds a line to the part's figures; the script says how the part ended."""
    with open(args.output / f"{args.part}.figures", "a") as file:
        print(json.dumps(figures), file=file)


# --- the machine, the tests ----------------------------------------------------------------------


def _check_versions(args: argparse.Namespace) -> None:
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU here: try the script with --device cpu")
    _record(
        args,
        {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": git_commit(),
            "gpu": torch.cuda.get_device_name() if on_gpu else None,
            # Whether "fp32" below means TF32.
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            "tf32_products": torch.backends.cuda.matmul.allow_tf32,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if on_gpu else None,
            "timm": timm.__version__,
            "detectron2": detectron2.__version__,
            "numpy": numpy.__version__,
        },
    )


def _run_tests(args: argparse.Namespace) -> None:
    report = args.output / "tests.xml"
    report.unlink(missing_ok=True)
    tests = _REPOSITORY / "tests" / "test_gpu.py"
    status = subprocess.run([sys.executable, "-m", "pytest", tests, f"--junitxml={report}"])
    if not report.exists():
        raise UserError(f"pytest did not run (exit status {status.returncode})")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    _record(args, counts)
    if status.returncode or (args.device == "cuda" and counts["skipped"]):
        raise UserError("not all tests passed")


# --- training ------------------------------------------------------------------------------------


def _draw_data(args: argparse.Namespace, config: str) -> tuple[list[str], dict[str, str]]:
    """Shapes in the form that a config's data set has: config keys, environment variables."""
    shapes = make_shapes(
        args.output / "shapes", num_train=32, num_val=8, min_side=400, max_side=560
    )
    folder = args.output / args.part / "data"
    if config.startswith("cityscapes/"):
        shapes_to_cityscapes(shapes, folder)
        return [], {"DETECTRON2_DATASETS": str(folder)}
    sets = shapes_datasets(shapes)
    if config.startswith("imagenet/"):
        crop_shapes(shapes, folder)
        sets = [[f"shapes_{split}", str(folder / split)] for split in ("train", "val")]
    register = ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)"]
    return ["DATASETS.REGISTER", str(sets), *register], {}


def _prepare(args: argparse.Namespace, config: str, iterations: int) -> Callable[..., dict]:
    """Draws the data; a call that trains in a folder of the part, evaluates and gives figures."""
    data, environment = _draw_data(args, config)
    own = _ON_GPU
    if args.device == "cpu":
        own = _ON_CPU + next(_SMALL[start] for start in _SMALL if config.startswith(start))
    command = [sys.executable, str(_REPOSITORY / "train_net.py")]
    command += ["--config-file", str(_REPOSITORY / "configs" / f"{config}.yaml")]
    options = [*_TRAINING.split(), *own.split(), *data, "MODEL.DEVICE", args.device]
    options += ["SOLVER.MAX_ITER", str(iterations)]

    def train(name: str, *more: str) -> dict:
        folder = args.output / args.part / name
        started = [*command, *options, "OUTPUT_DIR", str(folder), *more]
        if subprocess.run(started, env={**os.environ, **environment}).returncode:
            raise UserError("the training failed, see the lines above")
        return _figures(folder)

    return train


def _figures(folder: Path) -> dict:
    steps = [line for line in read_metrics(folder) if "total_loss" in line]
    metrics = read_results(str(folder))[-1]["metrics"]
    return {
        "losses": [line["total_loss"] for line in steps],
        # The first iterations are not timed.
        "seconds_per_iteration": median(line["time"] for line in steps if "time" in line),
        "memory_mb": max(line.get("gpu_memory_mb", 0) for line in steps) or None,
        "metrics": {
            f"{task}/{key}": value
            for task, values in metrics.items()
            for key, value in values.items()
            if "-" not in key  # of a class
        },
    }


def _train_and_resume(args: argparse.Namespace, *opts: str) -> None:
    """Trains Faster R-CNN, and goes on once more from the checkpoint in the middle."""
    config, half = ("faster_rcnn_contm", 20) if args.device == "cuda" else ("faster_rcnn_contti", 3)
    train = _prepare(args, config, 2 * half)
    opts = (*opts, "SOLVER.CHECKPOINT_PERIOD", str(half))
    whole = train("whole", *opts)
    _record(args, {"run": "uninterrupted", **whole})
    checkpoint = f"{numbered_name(half - 1)}.pth"
    resumed = args.output / args.part / "resumed"
    resumed.mkdir()
    shutil.copy(resumed.with_name("whole") / checkpoint, resumed)
    (resumed / LAST_CHECKPOINT).write_text(checkpoint)
    second = train("resumed", *opts, "--resume")
    pairs = zip(whole["losses"][half:], second["losses"], strict=True)
    differences = [abs(again / loss - 1) for loss, again in pairs]
    # A GPU adds in no fixed order: only the first loss has had no step that could differ.
    comparison = {"first_difference": differences[0], "largest_difference": max(differences)}
    _record(args, {"run": "resumed", **second, **comparison})


def _train_shortly(args: argparse.Namespace) -> None:
    train = _prepare(args, _SYSTEMS[args.part], 5)
    _record(args, train("run"))


# --- the network ---------------------------------------------------------------------------------


def _call(function: Callable[[Tensor], Tensor], images: Tensor, dtype: str, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        with torch.autocast(images.device.type, _DTYPES[dtype], enabled=dtype != "fp32"):
            out = function(images)
        if backward:
            out.float().mean().backward()


def _peak_mb(way: Callable[[], None], device: str) -> float | None:
    """Memory that a call takes at its peak, above what was there before."""
    if device != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _measure_network(args: argparse.Namespace) -> None:
    """ConT-M and the plain way of running its weights, side by side."""
    batch, rounds = (128, 10) if args.device == "cuda" else (1, 1)
    model = contnet.create_model("contnet_m").to(args.device)
    images = torch.randn(batch, 3, 224, 224, device=args.device)
    functions = {"contnet": model, "plain": partial(run_plain, model)}
    for backward in (False, True):
        model.train(backward)
        for dtype in _DTYPES:
            ways = {
                name: partial(_call, function, images, dtype, backward)
                for name, function in functions.items()
            }
            # Each of the first calls may plan something anew.
            for name, seconds in alternate(ways, rounds, warmup=3).items():
                _record(
                    args,
                    {
                        "network": name,
                        "pass": "forward and backward" if backward else "forward",
                        "precision": dtype,
                        "batch": batch,
                        "milliseconds": median(seconds) * 1e3,
                        "memory_mb": _peak_mb(ways[name], args.device),
                    },
                )


# --- the whole -----------------------------------------------------------------------------------

PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "versions": _check_versions,
    "tests": _run_tests,
    "faster_rcnn_fp32": _train_and_resume,
    "faster_rcnn_bf16": lambda args: _train_and_resume(
        args, "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"
    ),
    **dict.fromkeys(_SYSTEMS, _train_shortly),
    "network": _measure_network,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures one part, whose figures go into a file of the output folder; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--output", type=lambda name: Path(name).resolve(), required=True, metavar="FOLDER"
    )
    args = parser.parse_args(argv)
    runs = args.output / args.part
    shutil.rmtree(runs, ignore_errors=True)
    try:
        PARTS[args.part](args)
    except UserError as error:
        print_error(error)
        return 1
    finally:
        shutil.rmtree(runs, ignore_errors=True)  # checkpoints are large
    return 0


if __name__ == "__main__":
    sys.exit(main())
