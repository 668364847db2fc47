"""The demonstration: draws a data set, trains a small detector on it, evaluates it, shows pictures.

It goes through the same entry point as every training, with a data set that is registered by its
paths; only the data set and the page are made here.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.structures import Boxes, BoxMode, Instances

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.metadata import describe_model
from contnet.checkpoint.names import FINAL
from contnet.data.datasets.classes import dataset_class_names
from contnet.data.datasets.shapes import make_shapes, shapes_datasets
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.images import read_pixels
from contnet.data.pipeline.mappers import Mapper
from contnet.engine.writers import read_metrics
from contnet.launch.main import train
from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.build import build_model
from contnet.report.detection import write_detection_report
from contnet.report.pictures import Box, ReportImage
from contnet.utils.addresses import redact
from contnet.utils.command import run_command
from contnet.utils.errors import UserError

__all__ = ["REQUIRED_AP", "main", "run_demo"]

REQUIRED_AP = 60.0
_PICTURES = 12
_SHOWN_SCORE = 0.5
# Of the square images, in pixels: a multiple of 224 needs no margins in the network.
_SIDE = 224


def _boxes(boxes: torch.Tensor, classes: list[int], scores: list[float | None]) -> list[Box]:
    rows = zip(boxes.tolist(), classes, scores, strict=True)
    return [Box(tuple(xyxy), index, score) for xyxy, index, score in rows]


def _ground_truth(record: dict) -> list[Box]:
    boxes = [
        BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS)
        for item in record["annotations"]
    ]
    classes = [item["category_id"] for item in record["annotations"]]
    return _boxes(torch.tensor(boxes), classes, [None] * len(classes))


def _detections(instances: Instances) -> list[Box]:
    shown = instances[instances.scores >= _SHOWN_SCORE]
    boxes: Boxes = shown.pred_boxes
    return _boxes(boxes.tensor, shown.pred_classes.tolist(), shown.scores.tolist())


def _pictures(cfg: CfgNode) -> list[ReportImage]:
    """Detections of the trained model beside the ground truth, on the first validation images."""
    model = build_model(cfg).eval()
    records = load_dataset_dicts(cfg, cfg.DATASETS.TEST, train=False)[:_PICTURES]
    metadata = describe_model(cfg, dataset_class_names(cfg, cfg.DATASETS.TEST))
    Checkpointer(model, metadata=metadata).load(str(Path(cfg.OUTPUT_DIR, f"{FINAL}.pth")))
    loader = build_detection_test_loader(records, mapper=Mapper(cfg, is_train=False))
    pictures = []
    with torch.no_grad():
        for record, inputs in zip(records, loader, strict=True):
            (output,) = model(inputs)
            pictures.append(
                ReportImage(
                    name=Path(record["file_name"]).name,
                    image=read_pixels(record, "RGB", cfg.INPUT.MAX_PIXELS),
                    views={
                        "Ground truth": _ground_truth(record),
                        "Detections": _detections(output["instances"]),
                    },
                )
            )
    return pictures


def run_demo(config_file: Path, output: Path, opts: Sequence[str] = ()) -> tuple[float, Path]:
    """Draws, trains, evaluates and writes the page.

    Args:
        config_file: the detector and its schedule.
        output: folder for the data set (kept from run to run), the run and the page.
        opts: config keys and values.

    Returns:
        The last box AP on the validation images, in percent, and the page's path.

    Raises:
        UserError: if training failed.
    """
    start = time.monotonic()
    data, run = output / "data", output / "run"
    make_shapes(data, min_side=_SIDE, max_side=_SIDE)
    shutil.rmtree(run, ignore_errors=True)
    opts = ["DATASETS.REGISTER", str(shapes_datasets(data)), *opts, "OUTPUT_DIR", str(run)]
    train(["--config-file", str(config_file), *opts])
    cfg = load_checked_config(str(config_file), opts)
    metrics = read_metrics(run)
    ap = [line["bbox/AP"] for line in metrics if "bbox/AP" in line][-1]
    seconds = time.monotonic() - start
    page = write_detection_report(
        output / "report.html",
        title="ConTNet on drawn shapes",
        images=_pictures(cfg),
        metrics=metrics,
        summary={
            "box AP": f"{ap:.1f}",
            "command": redact(" ".join(sys.argv)),
            "backbone": cfg.MODEL.CONTNET.VARIANT,
            "iterations": cfg.SOLVER.MAX_ITER,
            "time": f"{seconds:.0f} s",
            "PyTorch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        },
        class_names=MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes,
    )
    return ap, page


def _run(args: argparse.Namespace) -> None:
    repository = Path(__file__).resolve().parents[4]
    ap, page = run_demo(repository / "configs" / "demo.yaml", args.output, args.opts)
    print(f"box AP {ap:.1f}")
    print(f"page {page.resolve()}")
    if not ap >= REQUIRED_AP:
        raise UserError(f"box AP is below {REQUIRED_AP:.0f}, something is broken")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of tools/demo.py; status 1 if the box AP is below ``REQUIRED_AP``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/demo"), metavar="FOLDER")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys and values")
    args = parser.parse_intermixed_args(argv)
    return run_command(lambda: _run(args))
