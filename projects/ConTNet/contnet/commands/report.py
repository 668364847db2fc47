"""The command line of tools/report.py: writes an HTML report of one or several runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from contnet.analysis.classification import classification_sections
from contnet.analysis.detection import detection_sections
from contnet.analysis.detector_errors import ErrorSettings
from contnet.analysis.galleries import GallerySettings
from contnet.analysis.runs import (
    RunRecord,
    curve_sections,
    difference_sections,
    result_sections,
)
from contnet.analysis.segmentation import SegmentationData, segmentation_sections
from contnet.commands.parsing import check_positive
from contnet.commands.results import collect_results
from contnet.data.datasets.coco import CocoSource
from contnet.data.datasets.register import find_source, register_datasets
from contnet.engine.run_page import PAGE, read_run_record
from contnet.engine.run_record import RUN_FILE
from contnet.evaluation.cityscapes import CONFUSION_FILE
from contnet.evaluation.classification import CLASSIFICATION_FILE
from contnet.evaluation.coco import COCO_RESULTS_FILE
from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.compat import silence_known_warnings
from contnet.prediction.predictor import load_run
from contnet.report.page import Notes, Section, Table, write_page
from contnet.utils.command import EXIT_STATUSES, run_command
from contnet.utils.errors import UsageError, UserError
from contnet.utils.records import peek_record
from contnet.utils.text import say

__all__ = ["ReportOptions", "build_parser", "main", "write_report"]

_SEED = 0  # for the bootstrap
_NO_PREDICTIONS = (
    "{run} has no predictions for {dataset} on disk. To make them, run: python train_net.py "
    "--config-file {run}/config.yaml --eval-only --resume OUTPUT_DIR {run}"
)
# Keys of run.json and of its ``versions``.
_START_FACTS = (
    "command",
    "time",
    "git_commit",
    "host",
    "device",
    "processes",
    "seed",
    "python",
    "torch",
    "contnet",
)
_COST_COLUMNS = (
    "run",
    "state",
    "iterations",
    "parameters M",
    "MACs G, without / with attention",
    "images/s in training",
    "memory MB",
)
_EPILOG = f"""\
parts of the page and the files they need
  curves, results, config differences   metrics.json, results.json, config.yaml of the run
  precision, errors, confusion, ...     inference/DATASET/, written by the last evaluation, and the
                                        data set's annotations
  images                                the images of the data set
Parts whose files are missing are left out, and the page says why.

examples:
  report.py output/faster_rcnn_contm
  report.py output/faster_rcnn_r50 output/faster_rcnn_contm --output compared.html

{EXIT_STATUSES}"""


@dataclass(frozen=True)
class ReportOptions:
    """Options of a page.

    Attributes:
        images: number of the worst images; a third as many of the best images follow.
        score: minimum score of the detections that are shown.
        resamples: number of bootstrap resamples.
    """

    images: int = 24
    score: float = 0.5
    resamples: int = 200


_DEFAULTS = ReportOptions()


# --- inputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A run's folder and its contents."""

    folder: Path
    record: RunRecord
    cfg: CfgNode | None
    problem: str

    def inference(self, dataset: str) -> Path:
        return self.folder / "inference" / dataset


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns unique names of the runs: the names of their folders, or their paths."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return names


def _read_run(folder: Path, name: str) -> _Run:
    cfg, problem = None, ""
    try:
        cfg = load_checked_config(str(folder / "config.yaml"))
        register_datasets(cfg)
    except UserError as error:  # also raised for different data under the same name
        cfg, problem = None, str(error)
    return _Run(folder, read_run_record(folder, name), cfg, problem)


# --- sections ------------------------------------------------------------------------------------


def _cost_table(runs: Sequence[_Run], rows: Sequence[dict]) -> Section:
    """Makes a table of state, parameters, MACs of classifiers, speed and memory."""
    cells = []
    for run, row in zip(runs, rows, strict=True):
        macs = row.get("macs_g")
        both = None if macs is None else f"{macs:.2f} / {row['macs_with_attention_g']:.2f}"
        costs = (row.get("parameters_m"), both, row["images_per_second"], row["memory_mb"])
        cells.append((run.record.name, [row["state"], row["iteration"], *costs]))
    return Table("Runs", _COST_COLUMNS, cells)


def _start_table(runs: Sequence[_Run]) -> list[Section]:
    """Makes a table of the last start of each run, from run.json."""
    attempts = {}
    for run in runs:
        found = peek_record(run.folder / RUN_FILE, list[dict]) or [{}]
        attempts[run.record.name] = {**found[-1], **found[-1].get("versions", {})}
    rows = []
    for key in _START_FACTS:
        values = [each.get(key) for each in attempts.values()]
        if any(value is not None for value in values):
            words = [" ".join(each) if isinstance(each, list) else each for each in values]
            rows.append((key.replace("_", " "), words))
    return [Table("Last start", ["", *attempts], rows, folded=True)] if rows else []


def _gallery_settings(run: _Run, images: int) -> GallerySettings:
    return GallerySettings(images, max_pixels=run.cfg.INPUT.MAX_PIXELS)


def _find_files(
    runs: Sequence[_Run], dataset: str, file_name: str
) -> tuple[dict[str, Path], list[Section]]:
    """Finds the prediction files for a data set by run; also returns notes on runs without any."""
    files = {run.record.name: run.inference(dataset) / file_name for run in runs}
    there = {name: file for name, file in files.items() if file.is_file()}
    notes = [
        _NO_PREDICTIONS.format(run=run.folder, dataset=dataset)
        for run in runs
        if run.record.name not in there
    ]
    return there, [Notes(f"Predictions: {dataset}", notes)] if notes else []


def _detection_source(dataset: str, run: _Run) -> CocoSource | None:
    """Returns the source of ground truth boxes; None for other kinds of data sets."""
    source = find_source(dataset)
    if isinstance(source, CocoSource):
        return source
    # For Cityscapes instances, the evaluation writes this file, with absolute image paths.
    files = sorted(run.inference(dataset).glob("annotations-*.json"))
    return CocoSource(str(files[-1]), "") if files else None


def _box_sections(runs: Sequence[_Run], dataset: str, options: ReportOptions) -> list[Section]:
    source = _detection_source(dataset, runs[0])
    files, sections = _find_files(runs, dataset, COCO_RESULTS_FILE)
    if not files or source is None:
        return sections
    settings = ErrorSettings(
        runs[0].cfg.TEST.DETECTIONS_PER_IMAGE, options.score, options.resamples
    )
    gallery = _gallery_settings(runs[0], options.images)
    return sections + detection_sections(dataset, source, files, settings, gallery)


def _class_sections(runs: Sequence[_Run], dataset: str, options: ReportOptions) -> list[Section]:
    files, sections = _find_files(runs, dataset, CLASSIFICATION_FILE)
    gallery = _gallery_settings(runs[0], options.images)
    return sections + classification_sections(dataset, files, options.resamples, _SEED, gallery)


def _load_segmenter(run: _Run) -> Callable[[np.ndarray], np.ndarray]:
    predictor = load_run(run.folder)
    return lambda image: predictor(image)["semantic"]


def _map_sections(runs: Sequence[_Run], dataset: str, options: ReportOptions) -> list[Section]:
    files, sections = _find_files(runs, dataset, CONFUSION_FILE)
    if not files:
        return sections
    predictors, notes = {}, []
    for run in runs:
        try:
            predictors[run.record.name] = _load_segmenter(run)
        except UserError as error:
            notes.append(f"Images of {run.record.name} are left out: {error}")
    metadata = MetadataCatalog.get(dataset)
    data = SegmentationData(Path(metadata.image_dir), Path(metadata.gt_dir))
    gallery = _gallery_settings(runs[0], options.images)
    resampling = (options.resamples, _SEED)
    sections += segmentation_sections(dataset, files, data, predictors, *resampling, gallery)
    return [*sections, Notes(f"Images: {dataset}", notes)] if notes else sections


# Functions that make the prediction sections, by evaluator_type of the data set's metadata.
_KINDS = {
    "coco": _box_sections,
    "cityscapes_instance": _box_sections,
    "classification": _class_sections,
    "cityscapes_sem_seg": _map_sections,
}


def _dataset_sections(runs: Sequence[_Run], dataset: str, options: ReportOptions) -> list[Section]:
    kind = MetadataCatalog.get(dataset).get("evaluator_type")
    if kind not in _KINDS:
        reason = f"Predictions on data sets of the kind {kind!r} cannot be analysed."
        return [Notes(f"Predictions: {dataset}", [reason])]
    return _KINDS[kind](runs, dataset, options)


def _prediction_sections(runs: Sequence[_Run], options: ReportOptions) -> list[Section]:
    sections: list[Section] = []
    unknown = [f"{run.record.name}: {run.problem}" for run in runs if run.cfg is None]
    if unknown:
        sections.append(Notes("Predictions: left out", unknown))
    known = [run for run in runs if run.cfg is not None]
    for dataset in dict.fromkeys(name for run in known for name in run.cfg.DATASETS.TEST):
        some = [run for run in known if dataset in run.cfg.DATASETS.TEST]
        sections += _dataset_sections(some, dataset, options)
    return sections


def write_report(
    folders: Sequence[Path], output: Path, options: ReportOptions = _DEFAULTS, title: str = ""
) -> Path:
    """Writes the page of one or more runs.

    Args:
        folders: folders of runs, or folders that contain them.
        output: path of the page.
        options: options of the page.
        title: heading of the page; by default the names of the runs.

    Returns:
        The path of the page.

    Raises:
        UserError: if a folder is not a run's folder and contains none.
    """
    rows = collect_results(folders, cost=True)
    paths = [Path(row["folder"]) for row in rows]
    runs = [_read_run(*each) for each in zip(paths, _names(paths), strict=True)]
    records = [run.record for run in runs]
    sections = [*result_sections(records), _cost_table(runs, rows), *_start_table(runs)]
    if len(runs) > 1:
        sections += difference_sections(records)
    sections += [*curve_sections(records), *_prediction_sections(runs, options)]
    return write_page(output, title or ", ".join(run.name for run in records), sections)


# --- the command ---------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of tools/report.py."""
    parser = argparse.ArgumentParser(
        description="Writes an HTML report of one run, or of several runs side by side.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of a sweep")
    add("--output", type=Path, metavar="FILE", help=f"the page (default: {PAGE} in the first RUN)")
    for name, kind, what in (
        ("images", int, "number of worst images; a third as many of the best follow"),
        ("score", float, "minimum score of the detections that are shown"),
        ("resamples", int, "number of bootstrap resamples"),
    ):
        default = getattr(_DEFAULTS, name)
        add(f"--{name}", type=kind, default=default, help=f"{what} (default {default})")
    return parser


def _run(args: argparse.Namespace) -> None:
    check_positive(args, "images", "resamples")
    if not 0 <= args.score <= 1:
        raise UsageError(f"--score is {args.score}, it must be from 0 to 1")
    options = ReportOptions(args.images, args.score, args.resamples)
    page = write_report(args.runs, args.output or args.runs[0] / PAGE, options)
    say(f"page {page.resolve()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/report.py and returns the exit status."""
    silence_known_warnings()
    args = build_parser().parse_args(argv)
    return run_command(lambda: _run(args))
