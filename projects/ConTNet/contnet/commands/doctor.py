"""The command line of tools/doctor.py: checks the data sets of a config, including all images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from contnet.commands.doctor_page import write_doctor_page
from contnet.commands.fix_annotations import fix_annotations
from contnet.commands.parsing import add_workers_option, check_positive
from contnet.data.datasets.register import register_datasets
from contnet.data.findings import ERROR, NOTE, SUSPECT, WARNING, Findings
from contnet.data.validation.classes import check_classes
from contnet.data.validation.dataset import examine_dataset
from contnet.data.validation.images import look_at_images
from contnet.launch.arguments import config_parser, configure
from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.compat import silence_known_warnings
from contnet.utils.command import run_command
from contnet.utils.errors import UsageError
from contnet.utils.text import plural, say

__all__ = ["build_parser", "diagnose", "main"]

# Severities by the word that the doctor prints.
_WORDS = {"ERROR": (ERROR, SUSPECT), "NOTE": (WARNING, NOTE)}

_EPILOG = """\
Problems that would stop or corrupt a training are ERRORs: the exit status is then 1. Differences
from the official data sets and harmless oddities are NOTEs: the exit status is 0. Training does not
start if there is an ERROR; for many crowds, it only warns. It also warns of NOTEs that affect what
is learned or measured.

--fix writes a copy of an annotation file, in which all problems with a clear solution are fixed:
ids, image names, missing areas, strings instead of numbers, ... It prints what it changed. It never
overwrites a file.

example:
  doctor.py --config-file configs/faster_rcnn_contm.yaml
  doctor.py --config-file my.yaml --page data.html
  doctor.py --config-file my.yaml --fix fixed.json --dataset my_train
"""


def diagnose(cfg: CfgNode, workers: int) -> dict[str, Findings]:
    """Checks all data sets of a config, and decodes their images.

    Args:
        cfg: config from :func:`contnet.launch.arguments.configure`.
        workers: number of processes.

    Returns:
        The findings by data set.

    Raises:
        UsageError: if the config has no data set.
    """
    names = list(dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]))
    if not names:
        raise UsageError("DATASETS.TRAIN and DATASETS.TEST are empty")
    examined = {name: examine_dataset(cfg, name) for name in names}
    found = {name: findings for name, (findings, _) in examined.items()}
    check_classes(cfg, found)
    for name, (findings, look) in examined.items():
        if look:
            look_at_images(look.inspect, look.find_all(), name, findings, workers)
    return found


def _print(name: str, findings: Findings) -> None:
    lines = [f"data set {name}", *(f"  {fact}" for fact in findings.facts)]
    for word, severities in _WORDS.items():
        for severity in severities:
            lines += [f"  {word:5}  {line}" for line in findings.lines(severity)]
    say(*lines)


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of tools/doctor.py."""
    parser = config_parser("Checks the data sets of a config file.", _EPILOG)
    add_workers_option(parser)
    parser.add_argument(
        "--fix",
        type=Path,
        metavar="OUT.json",
        help="write a fixed copy of the annotation file; no image is opened",
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="the data set to fix, if the config has several"
    )
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE.html",
        help="also write an HTML page: augmented training images, histograms of classes "
        "and sizes, near-duplicate images",
    )
    return parser


def _fix(args: argparse.Namespace) -> int:
    """Writes a fixed copy; the number of classes is not read, because the file may be unusable."""
    cfg = load_checked_config(args.config_file, args.opts)
    register_datasets(cfg)
    return 0 if fix_annotations(cfg, args.fix, args.dataset) else 1


def _run(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_intermixed_args(argv)
    check_positive(args, "workers")
    if args.fix:
        return _fix(args)
    if args.dataset:
        raise UsageError("--dataset requires --fix")
    cfg, added = configure(args.config_file, args.opts)
    say(*added)
    found = diagnose(cfg, args.workers)
    for name, findings in found.items():
        _print(name, findings)
    if args.page:
        page = write_doctor_page(args.page, cfg, found, _WORDS, args.workers)
        print(f"page {page.resolve()}")
    errors, notes = (
        sum(len(findings.lines(each)) for findings in found.values() for each in severities)
        for severities in _WORDS.values()
    )
    verdict = "this would stop or corrupt training" if errors else "training can start"
    print(f"{plural(errors, 'error')}, {plural(notes, 'note')}: {verdict}")
    return 1 if errors else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/doctor.py; returns exit status 1 if something would stop or corrupt training."""
    silence_known_warnings()
    return run_command(lambda: _run(argv))
