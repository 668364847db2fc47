"""Options that several tools have alike."""

from __future__ import annotations

import argparse

from contnet.utils.cpus import available_cpus
from contnet.utils.errors import UserError

__all__ = ["add_workers_option", "check_positive"]


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--workers``, the number of processes."""
    parser.add_argument(
        "--workers",
        type=int,
        default=available_cpus(),
        metavar="N",
        help="processes (default: one for each core)",
    )


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError unless these options are at least 1."""
    for name in names:
        if (value := getattr(args, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, it must be at least 1")
