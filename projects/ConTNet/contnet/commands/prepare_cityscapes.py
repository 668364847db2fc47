"""The command line of tools/prepare_cityscapes.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from contnet.commands.parsing import add_workers_option, check_positive
from contnet.data.datasets.cityscapes_labels import default_root, prepare_cityscapes
from contnet.utils.command import run_command

__all__ = ["main"]


def _run(args: argparse.Namespace) -> None:
    check_positive(args, "workers")
    written, kept = prepare_cityscapes(args.root, args.workers)
    print(f"{written} label files written, {kept} already existed")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/prepare_cityscapes.py and returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Draws Cityscapes' missing label files from its polygon files."
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=default_root(),
        metavar="FOLDER",
        help="folder with gtFine and leftImg8bit (default %(default)s)",
    )
    add_workers_option(parser)
    args = parser.parse_args(argv)
    return run_command(lambda: _run(args))
