"""The command line of tools/make_shards.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from contnet.commands.parsing import add_workers_option, check_positive
from contnet.data.datasets.shard_writer import SAMPLES_PER_SHARD, make_shards
from contnet.utils.command import run_command
from contnet.utils.text import plural, say

__all__ = ["main"]


def _run(args: argparse.Namespace) -> None:
    check_positive(args, "samples_per_shard", "workers")
    written, kept = make_shards(args.source, args.target, args.samples_per_shard, args.workers)
    say(f"{plural(written, 'shard')} written to {args.target}, {kept} already existed")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/make_shards.py and returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Packs class folders of images into shards in WebDataset's format. If "
        "interrupted, run it again to continue."
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="folder with one folder per class")
    parser.add_argument("target", type=Path, metavar="DST", help="folder for the shards")
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=SAMPLES_PER_SHARD,
        metavar="N",
        help="images per shard (default %(default)s)",
    )
    add_workers_option(parser)
    args = parser.parse_args(argv)
    return run_command(lambda: _run(args))
