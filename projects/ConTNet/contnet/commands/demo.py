"""Draws a data set, trains and evaluates a small detector on it, and writes a page with images.

The training uses the usual entry point, and the data set is registered by its paths; only the data
set and the page are made here.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from contnet.commands.report import ReportOptions, write_report
from contnet.data.datasets.shapes import make_shapes, shapes_datasets
from contnet.engine.run_page import PAGE
from contnet.engine.writers import read_metrics
from contnet.launch.main import train
from contnet.utils.command import run_command
from contnet.utils.cpus import available_cpus
from contnet.utils.errors import UserError

__all__ = ["REQUIRED_AP", "main", "run_demo"]

REQUIRED_AP = 60.0
_PICTURES = 12
_PROCESSES = 2  # of the training
# Side of the square images, in pixels; multiples of 224 need no margins in the network.
_SIDE = 224


def run_demo(config_file: str, output: Path, opts: Sequence[str] = ()) -> tuple[float, Path]:
    """Draws the data set, trains, evaluates and writes the page.

    Args:
        config_file: config of the detector and its schedule.
        output: folder for the data set (kept between runs), the run and the page.
        opts: config keys and values.

    Returns:
        The last box AP on the validation images, in percent, and the path of the page.

    Raises:
        UserError: if training fails.
    """
    data, run = output / "data", output / "run"
    make_shapes(data, min_side=_SIDE, max_side=_SIDE)
    shutil.rmtree(run, ignore_errors=True)
    opts = ["DATASETS.REGISTER", str(shapes_datasets(data)), *opts, "OUTPUT_DIR", str(run)]
    # One thread per process: on a busy machine, threads of one process wait for each other.
    processes = str(min(_PROCESSES, available_cpus()))
    train(["--config-file", config_file, "--num-gpus", processes, *opts])
    metrics = read_metrics(run)
    ap = [line["bbox/AP"] for line in metrics if "bbox/AP" in line][-1]
    options = ReportOptions(images=_PICTURES)
    page = write_report([run], output / PAGE, options, title="ConTNet on drawn shapes")
    return ap, page


def _run(args: argparse.Namespace) -> None:
    ap, page = run_demo("demo", args.output, args.opts)
    print(f"box AP {ap:.1f}")
    print(f"page {page.resolve()}")
    if not ap >= REQUIRED_AP:
        raise UserError(f"box AP is below {REQUIRED_AP:.0f}, training does not work")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/demo.py; returns exit status 1 if the box AP is below ``REQUIRED_AP``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/demo"), metavar="FOLDER")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys and values")
    args = parser.parse_intermixed_args(argv)
    return run_command(lambda: _run(args))
