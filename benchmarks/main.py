"""The command line of tools/benchmark.py: one subject for each thing that is measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import checkpoint, evaluation, loading, network, pixels, scaling, start_up, step
from benchmarks.timing import describe_machine
from contnet.utils.command import run_command

__all__ = ["build_parser", "main"]

# Each module's docstring opens with what it measures; add_arguments(parser), run(args).
SUBJECTS = {
    "checkpoint": checkpoint,
    "evaluation": evaluation,
    "loading": loading,
    "network": network,
    "pixels": pixels,
    "scaling": scaling,
    "start-up": start_up,
    "step": step,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of tools/benchmark.py."""
    parser = argparse.ArgumentParser(description="Measures side by side, as ratios.")
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, module in SUBJECTS.items():
        first = module.__doc__.splitlines()[0]
        subject = subjects.add_parser(name, help=first, description=first)
        module.add_arguments(subject)
    return parser


def _run(args: argparse.Namespace) -> None:
    print(describe_machine(), flush=True)
    SUBJECTS[args.subject].run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of tools/benchmark.py; its exit status."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: _run(args))
