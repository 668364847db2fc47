"""The command line of tools/benchmark.py, with one subcommand for each subject."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import checkpoint, evaluation, loading, network, pixels, scaling, start_up, step
from benchmarks.timing import describe_machine
from contnet.utils.command import run_command

__all__ = ["build_parser", "main"]

# The first line of a module's docstring is its help; modules have add_arguments and run.
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
    """Builds the parser of tools/benchmark.py."""
    parser = argparse.ArgumentParser(description="Times alternatives in turns and prints ratios.")
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
    """Runs tools/benchmark.py and returns the exit status."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: _run(args))
