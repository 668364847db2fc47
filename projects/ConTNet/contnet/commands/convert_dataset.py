"""The command line of tools/convert_dataset.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from contnet.data.conversion.common import Conversion
from contnet.data.conversion.voc import convert_voc
from contnet.data.conversion.yolo import convert_yolo, read_names
from contnet.data.findings import ERROR, NOTE
from contnet.utils.command import run_command
from contnet.utils.errors import UsageError, UserError
from contnet.utils.text import first_names, plural, say

__all__ = ["build_parser", "main"]

_EPILOG = """\
examples:
  convert_dataset.py voc VOCdevkit/mine train.json --split train
  convert_dataset.py voc Annotations train.json --images photos
  convert_dataset.py yolo mine val.json --split val

Objects and images that cannot be converted are left out, listed and counted; the exit status is
then 1, or 0 with --skip. See docs/own_data.md for more.
"""


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of tools/convert_dataset.py."""
    parser = argparse.ArgumentParser(
        description="Converts VOC XML files or YOLO text files to COCO JSON.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the annotations")
    common.add_argument("out", type=Path, metavar="OUT.json", help="output file")
    common.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="image folder (default: looked for in FOLDER and next to it)",
    )
    common.add_argument(
        "--split",
        default="",
        metavar="NAME",
        help="only this split: a name (train, val), or a file that lists images (default: all)",
    )
    common.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="class names in the order of their ids: data.yaml, or a file with one per line "
        "(default: voc: those of all XML files, sorted; yolo: data.yaml or classes.txt in FOLDER "
        "or above it)",
    )
    common.add_argument(
        "--skip", action="store_true", help="exit with status 0 even if something was left out"
    )
    common.add_argument("--force", action="store_true", help="replace OUT.json if it exists")
    forms = parser.add_subparsers(dest="form", required=True, metavar="{voc,yolo}")
    voc = forms.add_parser(
        "voc", parents=[common], help="XML files, as written by labelImg and CVAT"
    )
    voc.add_argument(
        "--first-pixel",
        type=int,
        choices=(0, 1),
        help="coordinate of the upper left pixel (default: 1 in files of the PASCAL VOC data "
        "sets, 0 in those of labelling tools)",
    )
    voc.add_argument("--skip-difficult", action="store_true", help="skip objects marked difficult")
    forms.add_parser("yolo", parents=[common], help="text files, as in Ultralytics and darknet")
    return parser


def _convert(args: argparse.Namespace) -> tuple[Conversion, Path]:
    for name in ("folder", "images"):
        if (path := getattr(args, name)) and not path.is_dir():
            raise UserError(f"{path} is not a folder")
    if args.names and not args.names.is_file():
        raise UserError(f"{args.names} does not exist")
    if args.out.suffix != ".json":
        raise UsageError(f"{args.out} does not end with .json: give FOLDER, then OUT.json")
    if args.out.exists() and not args.force:
        raise UserError(f"{args.out} already exists: give another name, or --force to replace it")
    if args.form == "yolo":
        return convert_yolo(args.folder, args.images, split=args.split, names_file=args.names)
    return convert_voc(
        args.folder,
        args.images,
        split=args.split,
        names=list(read_names(args.names).values()) if args.names else None,
        first_pixel=args.first_pixel,
        skip_difficult=args.skip_difficult,
    )


def _print(conversion: Conversion, written: dict[str, int], root: Path, out: Path) -> None:
    read, left_out = conversion.read, conversion.left_out
    lines = [f"read      {plural(read['images'], 'image')}, {plural(read['objects'], 'object')}"]
    empty = f" ({written['empty']} without objects)" if written["empty"] else ""
    names = list(conversion.classes.ids)
    lines.append(
        f"written   {plural(written['images'], 'image')}{empty}, "
        f"{plural(written['objects'], 'object')}, {plural(written['classes'], 'class')} "
        f"({first_names(names)})"
    )
    lines.append(
        f"left out  {plural(left_out['images'], 'image')}, {plural(left_out['objects'], 'object')}"
    )
    for severity, word in ((ERROR, "left out"), (NOTE, "note")):
        lines += [f"  {word:8}  {line}" for line in conversion.findings.lines(severity)]
    name = "mine_" + out.stem.removeprefix("mine_")
    entry = f"['{name}', '{out}', '{os.path.relpath(root)}']"
    lines.append(f"entry for DATASETS.REGISTER: {entry}")
    say(*lines)


def _run(args: argparse.Namespace) -> int:
    conversion, root = _convert(args)
    if not conversion.images:
        say(*conversion.findings.lines(ERROR))
    written = conversion.write(args.out)
    _print(conversion, written, root, args.out)
    return 1 if conversion.findings.lines(ERROR) and not args.skip else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/convert_dataset.py; returns exit status 1 if something was left out."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: _run(args))
