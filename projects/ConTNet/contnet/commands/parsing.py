"""Options that several tools share."""

from __future__ import annotations

import argparse
import math

from contnet.utils.cpus import available_cpus
from contnet.utils.errors import UsageError

__all__ = ["add_workers_option", "check_positive"]

# Maximum by option: no machine has more cores, so a larger number is a typing error.
_MOST = {"workers": 1024}


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--workers``, the number of processes."""
    parser.add_argument(
        "--workers",
        type=int,
        default=available_cpus(),
        metavar="N",
        help="number of processes (default: one per core)",
    )


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises UsageError if an option is below 1 or too large."""
    for name in names:
        value, most = getattr(args, name), _MOST.get(name, math.inf)
        if not 1 <= value <= most:
            legal = "at least 1" if value < 1 else f"at most {most}"
            raise UsageError(f"--{name.replace('_', '-')} is {value}, it must be {legal}")
