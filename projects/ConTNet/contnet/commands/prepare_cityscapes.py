"""The command line of tools/prepare_cityscapes.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from contnet.commands.parsing import add_workers_option, check_positive
from contnet.data.datasets.cityscapes_labels import default_root, prepare_cityscapes
from contnet.utils.errors import UserError, print_error

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of tools/prepare_cityscapes.py; its exit status."""
    parser = argparse.ArgumentParser(
        description="Draws the label files of Cityscapes that are missing beside its polygons."
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=default_root(),
        metavar="FOLDER",
        help="holds gtFine and leftImg8bit (default %(default)s)",
    )
    add_workers_option(parser)
    args = parser.parse_args(argv)
    try:
        check_positive(args, "workers")
        written, kept = prepare_cityscapes(args.root, args.workers)
    except UserError as error:
        print_error(error)
        return 1
    print(f"{written} label files written, {kept} were there already")
    return 0
