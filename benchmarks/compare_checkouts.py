"""Checks whether two checkouts train bit for bit the same.

The train_net.py of each checkout trains small models for a few iterations on drawn data, with one
thread and a fixed seed. Losses, metrics, detections, weights, EMA weights and the optimiser's state
are compared. Tensors are compared in the order of the modules, without their names, so that modules
may be renamed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from contnet.data.datasets.shapes import crop_shapes, make_shapes, shapes_datasets
from contnet.data.datasets.shapes_cityscapes import shapes_to_cityscapes
from contnet.utils.command import run_command

__all__ = ["CASES", "build_parser", "compare_checkouts", "compare_runs", "main"]

_COMMON = """
MODEL.DEVICE cpu DATALOADER.NUM_WORKERS 0 SEED 3 LOG_PERIOD 1 SOLVER.IMS_PER_BATCH 2
SOLVER.MAX_ITER 8 SOLVER.WARMUP_ITERS 2 SOLVER.CHECKPOINT_PERIOD 4 TEST.EVAL_PERIOD 4
"""
_DETECTOR = """
MODEL.CONTNET.NORM BN SOLVER.BASE_LR 0.002 SOLVER.STEPS (6,)
DATASETS.TRAIN ('shapes_train',) DATASETS.TEST ('shapes_val',)
INPUT.MIN_SIZE_TRAIN (64,80) INPUT.MAX_SIZE_TRAIN 96 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 96
MODEL.FPN.OUT_CHANNELS 32
"""
_RCNN = """
MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.RPN.PRE_NMS_TOPK_TEST 50
MODEL.RPN.POST_NMS_TOPK_TEST 20 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16
MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0
"""
_PSPNET = """
SOLVER.BASE_LR 0.002 INPUT.MIN_SIZE_TRAIN (64,96) INPUT.CROP.SIZE (48,64) INPUT.MIN_SIZE_TEST 64
INPUT.MAX_SIZE_TEST 96 MODEL.SEM_SEG_HEAD.CONVS_DIM 16
"""
_CLASSIFIER = """
DATASETS.TRAIN ('crops_train',) DATASETS.TEST ('crops_val',) SOLVER.IMS_PER_BATCH 8
INPUT.CLASSIFIER.SIZE 56 INPUT.CLASSIFIER.RESIZE_TEST 64 INPUT.CLASSIFIER.CROP_TEST 56
"""
_CUT_AT = "model_0000003.pth"
# Keys of metrics.json that differ between equal runs.
_TIMES = {"time", "data_time", "rank_data_time", "eta_seconds"}
_LOG_LINES = 15


@dataclass(frozen=True)
class Case:
    """A training run and what follows it.

    Attributes:
        config: config file in ``configs``.
        opts: config keys and values.
        processes: number of training processes.
        resume: whether to also resume the training from its middle.
        evaluate: whether to also evaluate the final weights separately, in one process.
    """

    config: str
    opts: str
    processes: int = 1
    resume: bool = False
    evaluate: bool = False


CASES: dict[str, Case] = {
    "faster_rcnn": Case(
        "faster_rcnn_contti.yaml",
        _DETECTOR + _RCNN + "SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.9",
        processes=2,
        evaluate=True,
    ),
    "fcos": Case(
        "fcos_contti.yaml",
        # A learning rate with which it detects something in the end.
        _DETECTOR
        + "MODEL.FPN.OUT_CHANNELS 64 MODEL.FCOS.SCORE_THRESH_TEST 0.0 SOLVER.BASE_LR 0.03",
    ),
    "mask_rcnn": Case("mask_rcnn_contti.yaml", _DETECTOR + _RCNN, resume=True),
    "pspnet": Case("cityscapes/pspnet_contti.yaml", _PSPNET),
    "classifier": Case("imagenet/contti_strong.yaml", _CLASSIFIER),
}


class TrainingError(Exception):
    """A training failed; the message has the checkout and the end of the log."""


# --- runs ----------------------------------------------------------------------------------------


def _draw_data(folder: Path) -> list[str]:
    """Draws data sets in ``folder``, the DETECTRON2_DATASETS; returns options to register them."""
    shapes = make_shapes(folder / "shapes", num_train=12, num_val=6, min_side=128, max_side=160)
    crop_shapes(shapes, folder / "crops")
    shapes_to_cityscapes(shapes, folder)
    crops = [[f"crops_{split}", str(folder / "crops" / split)] for split in ("train", "val")]
    return ["DATASETS.REGISTER", str([*shapes_datasets(shapes), *crops])]


def _train_net(checkout: Path, data: Path, arguments: Sequence[str], folder: Path) -> None:
    """Runs a checkout's train_net.py, which writes to ``folder``.

    Raises:
        TrainingError: if the training fails.
    """
    environment = {
        **os.environ,
        # Takes precedence over an installed package, which may be that of another checkout.
        "PYTHONPATH": str(checkout / "projects" / "ConTNet"),
        "OMP_NUM_THREADS": "1",
        "DETECTRON2_DATASETS": str(data),
        "XDG_CACHE_HOME": str(folder.parent / "cache"),
    }
    command = [sys.executable, str(checkout / "train_net.py"), *arguments]
    result = subprocess.run(
        [*command, "OUTPUT_DIR", str(folder)],
        env=environment,
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if result.returncode:
        end = "\n  ".join(result.stdout.splitlines()[-_LOG_LINES:])
        raise TrainingError(f"{folder.name} failed in {checkout}:\n  {end}")


def _cut(trained: Path, folder: Path) -> None:
    """Copies a run's folder as if the run had been interrupted after its first checkpoint."""
    shutil.copytree(trained, folder)
    (folder / "last_checkpoint").write_text(_CUT_AT)
    for file in folder.glob("*.pth"):
        if file.name != _CUT_AT:
            file.unlink()


def _run(case: Case, checkout: Path, data: Path, register: list[str], folder: Path) -> list[Path]:
    """Runs a case in one checkout; returns the folders of its runs."""
    config = ["--config-file", str(checkout / "configs" / case.config)]
    opts = [*_COMMON.split(), *register, *case.opts.split()]
    train = [*config, "--num-gpus", str(case.processes), *opts]
    trained = folder / "training"
    _train_net(checkout, data, train, trained)
    runs = [trained]
    if case.resume:
        runs.append(folder / "resumed training")
        _cut(trained, runs[-1])
        _train_net(checkout, data, [*train, "--resume"], runs[-1])
    if case.evaluate:
        runs.append(folder / "evaluation")
        weights = ["MODEL.WEIGHTS", str(trained / "model_final.pth")]
        _train_net(checkout, data, [*config, "--eval-only", *opts, *weights], runs[-1])
    return runs


# --- comparison ----------------------------------------------------------------------------------


def _metrics(folder: Path) -> dict[str, dict]:
    """Returns a run's metrics by iteration and by evaluation."""
    found = {}
    if (lines := folder / "metrics.json").exists():
        for line in map(json.loads, lines.read_text().splitlines()):
            rest = {k: v for k, v in line.items() if k not in _TIMES and "memory" not in k}
            found[f"metrics.json, iteration {rest.pop('iteration')}"] = rest
    for number, record in enumerate(json.loads((folder / "results.json").read_text())):
        place = f"results.json, evaluation {number} of {record['dataset']}"
        found[place] = {
            f"{task}/{key}": value
            for task, values in record["metrics"].items()
            for key, value in values.items()
        }
    return found


def _detections(folder: Path) -> dict[str, bytes]:
    """Returns the content of the detection files of a run's last evaluation, by path."""
    files = sorted((folder / "inference").glob("**/*.json"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _tensors(value: object) -> Iterator[Tensor]:
    """Yields all tensors in nested dicts and lists, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)


def _optimizer_state(content: object) -> Mapping | None:
    """Finds the state of the optimiser anywhere in a checkpoint."""
    if not isinstance(content, Mapping):
        return None
    if {"state", "param_groups"} <= content.keys():
        return content["state"]
    return next(filter(None, map(_optimizer_state, content.values())), None)


def _digest(tensor: Tensor) -> str:
    """Returns the SHA-256 of data type, shape and bytes."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(head + data).hexdigest()


def _digests(file: Path) -> dict[str, list[tuple[tuple[int, ...], str]]]:
    """Returns shape and digest of each tensor of a checkpoint, by part."""
    content = torch.load(file, map_location="cpu", weights_only=True)
    parts = {
        "weights": content["model"],
        "EMA weights": content.get("ema"),
        "optimiser's state": _optimizer_state(content),
    }
    return {
        part: [(tuple(tensor.shape), _digest(tensor)) for tensor in _tensors(value)]
        for part, value in parts.items()
    }


def _compare_metrics(before: Path, after: Path) -> list[str]:
    old, new = _metrics(before), _metrics(after)
    differences, one_sided = [], {}
    for place in dict.fromkeys([*old, *new]):
        if place not in old or place not in new:
            differences.append(f"{place}: only {'after' if place in new else 'before'} has it")
            continue
        for key in dict.fromkeys([*old[place], *new[place]]):
            if key not in old[place] or key not in new[place]:
                side = "after" if key in new[place] else "before"
                one_sided[f"{place.partition(',')[0]}: only {side} has {key}"] = None
            # Compared as text, because nan does not equal itself.
            elif repr(old[place][key]) != repr(new[place][key]):
                values = f"{old[place][key]!r} before, {new[place][key]!r} after"
                differences.append(f"{place}, {key}: {values}")
    return differences[:1] + list(one_sided)


def _compare_detections(before: Path, after: Path) -> list[str]:
    old, new = _detections(before), _detections(after)
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name}: differs" for name in differing[:1]]


def _compare_checkpoints(before: Path, after: Path) -> list[str]:
    old, new = _digests(before), _digests(after)
    for part in old:
        if len(old[part]) != len(new[part]):
            return [f"{part}: {len(old[part])} tensors before, {len(new[part])} after"]
        for index, (one, other) in enumerate(zip(old[part], new[part], strict=True)):
            if one != other:
                shapes = f"of shape {one[0]}" + (f", {other[0]} after" * (one[0] != other[0]))
                return [f"{part}: tensor {index} of {len(old[part])}, {shapes}"]
    return []


def compare_runs(before: Path, after: Path) -> list[str]:
    """Compares the folders of two runs; returns no lines if they are bit for bit equal.

    The lines have the first metric that differs, the metrics that only one run has, the first
    detection file and the first tensor that differ.
    """
    differences = _compare_metrics(before, after) + _compare_detections(before, after)
    files = [folder / "model_final.pth" for folder in (before, after)]
    if any(file.exists() for file in files):
        differences += _compare_checkpoints(*files)
    return [f"{before.name}: {difference}" for difference in differences]


# --- all cases -----------------------------------------------------------------------------------


def compare_checkouts(before: Path, after: Path, names: Sequence[str] = tuple(CASES)) -> bool:
    """Runs cases in two checkouts and prints a line for each, with the differences.

    Args:
        before: folder of the first checkout.
        after: folder of the second checkout.
        names: names of the cases.

    Returns:
        Whether all runs are bit for bit equal.
    """
    equal = True
    with tempfile.TemporaryDirectory(prefix="contnet_compare_") as temporary:
        data = Path(temporary, "data").resolve()
        register = _draw_data(data)
        for name in names:
            start = time.perf_counter()
            # The folders of a case take some hundred MB.
            with tempfile.TemporaryDirectory(dir=temporary) as place:
                try:
                    runs = [
                        _run(CASES[name], checkout, data, register, Path(place, side))
                        for side, checkout in {"before": before, "after": after}.items()
                    ]
                    differences = [
                        line for pair in zip(*runs, strict=True) for line in compare_runs(*pair)
                    ]
                    verdict = "DIFFERENT" if differences else "equal bit for bit"
                except TrainingError as error:
                    verdict, differences = "FAILED", [str(error)]
            print(f"{name}: {verdict} ({time.perf_counter() - start:.0f} s)", flush=True)
            for line in differences:
                print(f"  {line}", flush=True)
            equal = equal and not differences
    return equal


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of tools/compare_checkouts.py."""
    parser = argparse.ArgumentParser(
        description="Trains small models in two checkouts and checks whether the results are equal "
        "bit for bit. Exit status: 0 if they are, 1 if not."
    )
    parser.add_argument("before", type=Path, metavar="BEFORE", help="folder of a checkout")
    parser.add_argument(
        "after", type=Path, nargs="?", metavar="AFTER", help="another checkout (default: this one)"
    )
    parser.add_argument("--only", choices=CASES, metavar="CASE", help=f"one of {', '.join(CASES)}")
    return parser


def main(repository: Path, argv: Sequence[str] | None = None) -> int:
    """Runs tools/compare_checkouts.py.

    Args:
        repository: folder of this checkout.
        argv: command line; ``sys.argv`` by default.

    Returns:
        The exit status: 0 if the results are bit for bit equal, else 1.

    Raises:
        SystemExit: with status 2, if the command line is not valid.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    checkouts = [args.before.resolve(), (args.after or repository).resolve()]
    for checkout in checkouts:
        # A checkout without its own package would use the installed one.
        for part in ("train_net.py", "configs", "projects/ConTNet/contnet"):
            if not (checkout / part).exists():
                parser.error(f"{checkout} has no {part}: give the folder of a checkout")
    names = [args.only] if args.only else list(CASES)
    return run_command(lambda: 0 if compare_checkouts(*checkouts, names) else 1)
