"""Time that training loses to a checkpoint, written in the background and synchronously."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.step import build_step
from benchmarks.timing import alternate
from contnet.checkpoint.checkpointer import Checkpointer
from contnet.launch.preflight_config import load_checked_config

__all__ = ["add_arguments", "measure", "run"]

# Few proposals make steps cheap, and do not change the size of the state.
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
        metavar="N",
        help="steps in a window, long enough to write a file, because the rest of the writing "
        "counts as lost (default 3 on a CPU, 60 on a GPU)",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=(64, 64), metavar=("H", "W"), help="size in pixels"
    )
    parser.add_argument(
        "--folder", default=".", metavar="FOLDER", help="folder on the disk to write to"
    )


class _Training:
    """Training steps of a detector on one image, and its checkpoints."""

    def __init__(self, args: argparse.Namespace, folder: str):
        options = {"MODEL.DEVICE": args.device, "SOLVER.BASE_LR": "1e-9", **_FEW}
        cfg = load_checked_config(
            args.config_file, [word for pair in options.items() for word in pair]
        )
        model, optimizer, self.step = build_step(cfg, 1, tuple(args.size))
        self.steps = args.steps or (3 if args.device == "cpu" else 60)
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
        """Saves a checkpoint, unless ``background`` is None, and runs some steps."""
        torch.manual_seed(0)
        if background is not None:
            start = time.perf_counter()
            self.checkpointers[background].save("model_0000000")
            self.in_save[background].append(time.perf_counter() - start)
        for _ in range(self.steps):
            self.step()
        if background:
            self.checkpointers[background].wait()


def _spread(milliseconds: list[float]) -> str:
    low, high = min(milliseconds), max(milliseconds)
    return f"median {median(milliseconds):7.1f} ms  ({low:.1f} to {high:.1f})"


def measure(args: argparse.Namespace, folder: str) -> dict:
    """Times windows with and without checkpoints.

    Args:
        args: options of the command line; ``folder`` is not used.
        folder: an empty folder; the checkpoints remain in it.

    Returns:
        ``megabytes`` of a checkpoint, ``steps`` of a window; lists of milliseconds: ``step_ms``
        and, for each way of saving, ``{way}_save_ms`` in ``save()`` and ``{way}_lost_ms`` in total;
        ``share``: time lost in the background relative to a synchronous save.
    """
    training = _Training(args, folder)
    training.step()  # creates the optimiser's state
    ways = {
        "none": training.window,
        "synchronous": lambda: training.window(False),
        "background": lambda: training.window(True),
    }
    seconds = alternate(ways, args.rounds)
    (file, *_) = Path(folder).rglob("*.pth")
    figures = {
        "megabytes": file.stat().st_size / 1e6,
        "steps": training.steps,
        "step_ms": [1e3 * each / training.steps for each in seconds["none"]],
    }
    for background, name in enumerate(list(ways)[1:]):
        pairs = zip(seconds[name], seconds["none"], strict=True)
        figures[f"{name}_save_ms"] = [1e3 * each for each in training.in_save[bool(background)][1:]]
        figures[f"{name}_lost_ms"] = [1e3 * (own - none) for own, none in pairs]
    lost = median(figures["synchronous_lost_ms"])
    figures["share"] = median(figures["background_lost_ms"]) / lost
    return figures


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = measure(args, folder)
    print(f"checkpoint of {figures['megabytes']:.0f} MB; windows of {figures['steps']} steps")
    print(f"a step                      {_spread(figures['step_ms'])}")
    for name in ("synchronous", "background"):
        print(f"{name:12} in save()      {_spread(figures[f'{name}_save_ms'])}")
        print(f"{name:12} lost in all    {_spread(figures[f'{name}_lost_ms'])}")
    share = 100 * figures["share"]
    print(f"lost in the background: {share:.1f} % of what a synchronous save loses")
