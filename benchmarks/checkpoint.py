"""Time that a training loses to a checkpoint, written in the background and waited for."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.step import build_step, random_batch
from benchmarks.timing import alternate
from contnet.checkpoint.checkpointer import Checkpointer
from contnet.launch.preflight_config import load_checked_config

__all__ = ["add_arguments", "run"]

# Cheap steps, so that there can be many: the state is as large with few proposals as with many.
_FEW = {
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": "100",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "50",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "16",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", default="configs/faster_rcnn_contm.yaml", metavar="FILE")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="windows of each kind")
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        metavar="N",
        help="in a window: so many that a file is written in their time (the rest counts as lost)",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=(64, 64), metavar=("H", "W"), help="in pixels"
    )
    parser.add_argument(
        "--folder", default=".", metavar="FOLDER", help="on the disk that is written to"
    )


class _Training:
    """Steps of a detector on one image, and checkpoints of it."""

    def __init__(self, args: argparse.Namespace, folder: str):
        options = {"MODEL.DEVICE": args.device, "SOLVER.BASE_LR": "1e-9", **_FEW}
        cfg = load_checked_config(
            args.config_file, [word for pair in options.items() for word in pair]
        )
        batch = random_batch(1, tuple(args.size))
        model, optimizer, self.step = build_step(cfg, batch)
        self.steps = args.steps
        self.in_save: dict[bool, list[float]] = {False: [], True: []}
        self.checkpointers = {}
        for background in self.in_save:
            own = Path(folder, "background" if background else "synchronous")
            own.mkdir()
            self.checkpointers[background] = Checkpointer(
                model,
                str(own),
                background=background,
                model_optimizer=optimizer,
                optimizer=optimizer,
            )

    def window(self, background: bool | None = None) -> None:
        """Saves, unless ``background`` is None, and does some steps."""
        torch.manual_seed(0)
        if background is not None:
            start = time.perf_counter()
            self.checkpointers[background].save("model_0000000")
            self.in_save[background].append(time.perf_counter() - start)
        for _ in range(self.steps):
            self.step()
        if background:
            self.checkpointers[background].wait()


def _milliseconds(seconds: list[float]) -> str:
    low, middle, high = (1e3 * each for each in (min(seconds), median(seconds), max(seconds)))
    return f"median {middle:7.1f} ms  ({low:.1f} to {high:.1f})"


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        training = _Training(args, folder)
        training.step()  # which makes the optimiser's state
        ways = {
            "none": training.window,
            "synchronous": lambda: training.window(False),
            "background": lambda: training.window(True),
        }
        seconds = alternate(ways, args.rounds)
        (file, *_) = Path(folder).rglob("*.pth")
        size = file.stat().st_size / 1e6
    print(f"checkpoint of {size:.0f} MB; windows of {args.steps} steps")
    print(f"a step                      {_milliseconds([t / args.steps for t in seconds['none']])}")
    lost = {}
    for background, name in enumerate(list(ways)[1:]):
        pairs = zip(seconds[name], seconds["none"], strict=True)
        lost[name] = [own - none for own, none in pairs]
        print(f"{name:12} in save()      {_milliseconds(training.in_save[bool(background)][1:])}")
        print(f"{name:12} lost in all    {_milliseconds(lost[name])}")
    share = median(lost["background"]) / median(lost["synchronous"])
    print(f"lost in the background: {100 * share:.1f} % of what a synchronous save loses")
