"""The command line of tools/export.py: exports a trained model to run without this project."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from contnet.export.folder import ExportSettings, export_model
from contnet.export.formats import FORMATS
from contnet.modeling.compat import silence_known_warnings
from contnet.prediction.inputs import find_inputs
from contnet.prediction.predictor import load_run
from contnet.utils.command import EXIT_STATUSES, run_command
from contnet.utils.text import say

__all__ = ["build_parser", "main"]

_EPILOG = f"""\
FOLDER must not exist. These files are written to it:

  model.onnx, model.pt2 or model.pt  the model
  model.json                         how to prepare images, the names of outputs and classes
  example.py                         runs the model on an image; needs neither this project nor
                                     Detectron2

examples:
  export.py output/contm exported --format onnx --int8
  export.py output/fcos_contm exported --format torch-export --images photos/

{EXIT_STATUSES}"""


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of tools/export.py."""
    parser = argparse.ArgumentParser(
        description="Exports a trained model and compares the export with it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="RUN", help="the folder of a run (its best weights), or a checkpoint")
    add("target", type=Path, metavar="FOLDER", help="folder to create")
    add("--format", choices=FORMATS, required=True, help="format of the model's file")
    add("--config-file", default="", metavar="FILE", help="config of a checkpoint without one")
    add("--backbone", action="store_true", help="export only the backbone")
    add(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="type of a classifier, or of a detector's or segmenter's backbone (default float32)",
    )
    add("--int8", action="store_true", help="int8 weights; only for classifiers in ONNX")
    add(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with PyTorch and measure the speed",
    )
    add(
        "--images",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images and folders to compare on (default: some of the test set, or drawn images)",
    )
    return parser


def _run(args: argparse.Namespace) -> None:
    given = find_inputs(args.images, sys.stdin, "").files if args.images else []
    settings = ExportSettings(
        format=args.format,
        backbone=args.backbone,
        dtype=args.dtype,
        int8=args.int8,
        check=args.check,
        images=[Path(each.path) for each in given if not each.is_video],
    )
    predictor = load_run(args.source, args.config_file, device="cpu")
    export_model(predictor, args.target, settings)
    say(f"done: python {args.target / 'example.py'} IMAGE")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/export.py; returns exit status 1 if the export differs too much from the model."""
    silence_known_warnings()
    args = build_parser().parse_args(argv)
    return run_command(lambda: _run(args))
