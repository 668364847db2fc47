"""The command line of tools/predict.py: runs a trained model on images and videos."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from contnet.commands.parsing import check_positive
from contnet.launch.distributed import launch_run
from contnet.launch.environment import Processes
from contnet.modeling.compat import silence_known_warnings
from contnet.prediction.files import PredictionSettings, predict_files
from contnet.prediction.inputs import find_inputs
from contnet.utils.command import EXIT_STATUSES, run_command
from contnet.utils.cpus import available_cpus
from contnet.utils.errors import UsageError

__all__ = ["build_parser", "main"]

_MOST_WORKERS = 4  # default maximum for a model on a GPU

_EPILOG = f"""\
files written to FOLDER:
  predictions.json  boxes and masks in COCO's results format, the maps of segmenters, or the top
                    five classes of each image
  images/           the images with the predictions drawn on them
  index.html        thumbnails, which link to the images
  maps/, videos/    maps of class indices; videos

examples:
  predict.py output/faster_rcnn_contm photos/ --output found
  predict.py output/faster_rcnn_contm/model_best.pth a.jpg 'b/**/*.png' film.mp4 --output found
  predict.py output/mask_rcnn_contm aerial.tif --tile 800 200 --classes boat car --output found
  find . -name '*.jpg' | predict.py output/run - --output found --score 0.3

{EXIT_STATUSES}"""


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of tools/predict.py."""
    parser = argparse.ArgumentParser(
        description="Runs a trained model on images and videos; saves and draws its predictions.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="RUN", help="the folder of a run (its best weights), or a checkpoint")
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="images, videos, folders, glob patterns, COCO files (annotations optional); - reads "
        "paths from the standard input",
    )
    add("--output", required=True, type=Path, metavar="FOLDER", help="output folder")
    add(
        "--config-file",
        default="",
        metavar="FILE",
        help="config of a checkpoint that does not contain one",
    )
    add("--image-root", default="", metavar="FOLDER", help="image folder of COCO files")
    add(
        "--score", type=float, default=0.5, metavar="S", help="minimum score of boxes (default 0.5)"
    )
    add("--classes", nargs="+", default=[], metavar="NAME", help="keep only these classes")
    add(
        "--tile",
        nargs=2,
        type=int,
        metavar=("SIZE", "OVERLAP"),
        help="also run on tiles, in pixels",
    )
    add("--batch", type=int, default=1, metavar="N", help="batch size (default 1)")
    add("--num-gpus", type=int, default=1, metavar="N", help="processes, one per GPU (default 1)")
    add("--device", default="", help="cpu or cuda (default: cuda if there is a GPU)")
    add(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="number of processes that decode images",
    )
    add("--no-pictures", action="store_true", help="write only predictions.json (and maps)")
    return parser


def _run(args: argparse.Namespace) -> None:
    check_positive(args, "batch", "num_gpus")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not 0 <= args.score <= 1:
        raise UsageError(f"--score is {args.score}, it must be from 0 to 1")
    workers = args.workers
    if workers is None:
        workers = min(_MOST_WORKERS, available_cpus() - 1) if device == "cuda" else 0
    settings = PredictionSettings(
        source=args.source,
        inputs=find_inputs(args.inputs, sys.stdin, args.image_root),
        output=args.output,
        config_file=args.config_file,
        device=device,
        score=args.score,
        classes=tuple(args.classes),
        batch_size=args.batch,
        tile=tuple(args.tile) if args.tile else None,
        workers=workers,
        pictures=not args.no_pictures,
    )
    launch_run(predict_files, settings, Processes(args.num_gpus), device.partition(":")[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/predict.py; returns exit status 1 if a file could not be read."""
    silence_known_warnings()
    args = build_parser().parse_intermixed_args(argv)
    return run_command(lambda: _run(args))
