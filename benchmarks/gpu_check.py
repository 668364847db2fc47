"""The parts of tools/gpu_check.sh, each in a separate process, and their report."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.gpu.part import Part
from benchmarks.gpu.report import PAGE, write_report
from contnet.utils.command import run_command

__all__ = ["PARTS", "main"]

# Module of benchmarks.gpu and function of each part, the most valuable first. A process imports
# only the module that it needs, because importing all takes seconds.
PARTS = {
    "versions": ("machine", "check_versions"),
    "tests": ("machine", "run_tests"),
    "attention": ("attention", "measure_attention"),
    "faster_rcnn": ("training", "train_and_resume"),
    "network": ("network", "measure_network"),
    "systems": ("training", "train_systems"),
    "steps": ("steps", "measure_steps"),
    "inference": ("network", "measure_inference"),
    "profile": ("steps", "profile_steps"),
    "ddp": ("steps", "measure_ddp"),
    "checkpoint": ("steps", "measure_checkpoint"),
    "compiled": ("network", "measure_compiled"),
}
_REPOSITORY = Path(__file__).resolve().parents[1]


def _run_part(name: str, device: str, output: Path) -> None:
    runs = output / name
    shutil.rmtree(runs, ignore_errors=True)
    # Detectron2 reads this variable when it is imported.
    os.environ["DETECTRON2_DATASETS"] = str(runs / "datasets")
    part = Part(name, device, output)
    module, function = PARTS[name]
    try:
        getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(part)
        part.finish()
    finally:
        shutil.rmtree(runs, ignore_errors=True)  # checkpoints are large


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one part, whose results go to a file in the output folder, or writes the report.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("part", nargs="?", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    what.add_argument(
        "--report",
        nargs="?",
        const=_REPOSITORY / PAGE,
        type=Path,
        metavar="FILE",
        help=f"write the report of the output folder's results (default: this repository's {PAGE}),"
        " and copy them beside it",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device")
    parser.add_argument(
        "--output",
        type=lambda name: Path(name).resolve(),
        default=Path("output/gpu_check").resolve(),
        metavar="FOLDER",
        help="output folder of tools/gpu_check.sh (default: output/gpu_check)",
    )
    args = parser.parse_args(argv)
    if args.report is not None:
        return run_command(partial(write_report, args.output, args.report))
    return run_command(partial(_run_part, args.part, args.device, args.output))


if __name__ == "__main__":
    sys.exit(main())
