"""Draws and crops shapes, and trains and evaluates a small ConTNet classifier on them.

The training uses the usual entry point, with one folder per class as in ImageNet.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from contnet.data.datasets.shapes import crop_shapes, make_shapes
from contnet.evaluation.results import read_results
from contnet.launch.main import train
from contnet.utils.command import run_command
from contnet.utils.errors import UserError

__all__ = ["REQUIRED_TOP1", "main", "run_demo"]

REQUIRED_TOP1 = 90.0
_SIDE = 384  # in pixels


def run_demo(config_file: str, output: Path, opts: Sequence[str] = ()) -> float:
    """Draws the images, trains and evaluates.

    Args:
        config_file: config of the classifier and its schedule.
        output: folder for the pictures and the run.
        opts: config keys and values.

    Returns:
        The top-1 accuracy on the validation images, in percent.

    Raises:
        UserError: if training fails.
    """
    run, pictures = output / "run", (output / "pictures").resolve()
    # In large images, few objects are partly hidden.
    data = make_shapes(output / "data", num_train=300, min_side=_SIDE, max_side=_SIDE)
    crop_shapes(data, pictures)
    shutil.rmtree(run, ignore_errors=True)
    sets = [[f"pictures_{split}", str(pictures / split)] for split in ("train", "val")]
    opts = ["DATASETS.REGISTER", str(sets), *opts, "OUTPUT_DIR", str(run)]
    train(["--config-file", config_file, *opts])
    return read_results(str(run))[-1]["metrics"]["classification"]["top1"]


def _run(args: argparse.Namespace) -> None:
    top1 = run_demo("demo_imagenet", args.output, args.opts)
    print(f"top-1 {top1:.1f}")
    if not top1 >= REQUIRED_TOP1:
        raise UserError(f"top-1 is below {REQUIRED_TOP1:.0f}, training does not work")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/demo_imagenet.py; returns exit status 1 if top-1 is below ``REQUIRED_TOP1``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("output/demo_imagenet"), metavar="FOLDER"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys and values")
    args = parser.parse_intermixed_args(argv)
    return run_command(lambda: _run(args))
