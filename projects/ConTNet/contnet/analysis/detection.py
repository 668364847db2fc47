"""Analyses the boxes of detectors that an evaluation has written to disk."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from contnet.analysis.detector_errors import (
    KINDS,
    DetectorErrors,
    ErrorSettings,
    count_errors,
    has_hotcoco,
)
from contnet.analysis.galleries import GallerySettings, build_gallery, choose_images
from contnet.analysis.tables import confusion_section, difference_table
from contnet.data.datasets.classes import distinct_class_names
from contnet.data.datasets.coco import CocoSource, class_names
from contnet.evaluation.coco_ap import ArrayEvaluation, Detections
from contnet.report.curves import Line, Plot
from contnet.report.page import Curves, Facts, Notes, Section, Table
from contnet.report.pictures import Box, ReportImage
from contnet.utils.errors import UserError
from contnet.utils.files import open_regular

__all__ = ["detection_sections"]

_EQUAL = 1e-6  # maximum difference between hotcoco's and pycocotools' AP, in percent
_BACKGROUND = "background"


# --- inputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Truth:
    """An annotation file.

    Attributes:
        source: the file and its image folder.
        content: the file's content.
        ids: the ids of its categories, in order.
        names: the names of these categories.
    """

    source: CocoSource
    content: dict
    ids: list[int]
    names: list[str]

    @property
    def images(self) -> dict[int, dict]:
        return {each["id"]: each for each in self.content["images"]}

    def coco(self) -> COCO:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = self.content
            coco.createIndex()
        return coco


def _read_truth(source: CocoSource) -> _Truth:
    content = source.read()
    if not content.get("annotations"):
        raise UserError(f"{source.json_file} has no annotations to compare with")
    ids = sorted(each["id"] for each in content["categories"])
    return _Truth(source, content, ids, distinct_class_names(class_names(content), ids))


def _read_detections(file: Path, truth: _Truth) -> list[dict]:
    """Returns the rows of a results file.

    Raises:
        UserError: if it cannot be read, or has images or classes that the annotations lack.
    """
    try:
        with open_regular(file) as stream:
            rows = json.load(stream)
        images = {each["image_id"] for each in rows}
        categories = {each["category_id"] for each in rows}
        boxes = [[float(value) for value in each["bbox"]] for each in rows]
        scores = [float(each["score"]) for each in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
    if any(len(box) != 4 for box in boxes) or not all(map(math.isfinite, scores)):
        raise UserError(f"{file} has a box without four numbers, or a score that is not finite")
    if not images <= set(truth.images) or not categories <= set(truth.ids):
        raise UserError(
            f"{file} has other images or classes than {truth.source.json_file}: evaluate again "
            "(--eval-only)"
        )
    return rows


# --- precision -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Precision:
    """pycocotools' metrics of a run's boxes.

    Attributes:
        curves: precision (thresholds, levels of recall, classes); -1 for classes without objects.
        thresholds, levels: IoU thresholds and levels of recall of the curves.
        metrics: AP, AP50 and AP75 in percent.
        class_ap: AP by category id.
    """

    curves: np.ndarray
    thresholds: np.ndarray
    levels: np.ndarray
    metrics: dict[str, float]
    class_ap: dict[int, float]


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return 100 * float(known.mean()) if known.size else math.nan


def _measure(truth: _Truth, rows: Sequence[dict], limit: int) -> _Precision:
    found = Detections(
        np.array([each["image_id"] for each in rows], dtype=np.int64),
        np.array([each["category_id"] for each in rows], dtype=np.int64),
        np.array([each["score"] for each in rows], dtype=float),
        np.array([each["bbox"] for each in rows], dtype=float).reshape(-1, 4),
        None,
        np.zeros(0),
    )
    evaluation = ArrayEvaluation(truth.coco(), found, "bbox")
    evaluation.params.maxDets = [1, 10, limit]
    evaluation.evaluate()
    evaluation.accumulate()
    curves = evaluation.eval["precision"][:, :, :, 0, -1]
    thresholds = evaluation.params.iouThrs
    at = {f"AP{t}": np.isclose(thresholds, t / 100) for t in (50, 75)}
    metrics = {"AP": _mean(curves), **{name: _mean(curves[rows]) for name, rows in at.items()}}
    class_ap = {key: _mean(curves[:, :, k]) for k, key in enumerate(truth.ids)}
    return _Precision(curves, thresholds, evaluation.params.recThrs, metrics, class_ap)


def _precision_lines(prefix: str, measured: _Precision, names: Sequence[str]) -> list[Line]:
    levels, curves, lines = measured.levels, measured.curves, []
    for threshold in (0.5, 0.75):
        at = curves[np.isclose(measured.thresholds, threshold)][0]
        known = at[:, (at > -1).all(axis=0)]
        if known.shape[1]:
            lines.append(Line(f"{prefix}all classes, IoU {threshold}", levels, known.mean(axis=1)))
    at = curves[np.isclose(measured.thresholds, 0.5)][0]
    for k, name in enumerate(names):
        if (at[:, k] > -1).all():
            lines.append(Line(f"{prefix}{name}, IoU 0.5", levels, at[:, k], shown=False))
    return lines


def _precision_section(measured: Mapping[str, _Precision], truth: _Truth, title: str) -> Section:
    prefixes = {name: f"{name}: " if len(measured) > 1 else "" for name in measured}
    lines = [
        line
        for name, each in measured.items()
        for line in _precision_lines(prefixes[name], each, truth.names)
    ]
    lines.sort(key=lambda line: not line.shown)
    plot = Plot("Precision over recall", "recall", "precision", lines)
    # The table has every tenth level of recall.
    rows = [
        (f"{level:.1f}", {line.label: float(line.y[10 * i]) for line in lines})
        for i, level in enumerate(np.linspace(0, 1, 11))
    ]
    columns = ["recall", *(line.label for line in lines if line.shown)]
    return Curves(f"Precision and recall: {title}", [plot], columns, rows, 101)


# --- errors --------------------------------------------------------------------------------------


def _same(ours: float, theirs: float) -> bool:
    return (math.isnan(ours) and math.isnan(theirs)) or abs(ours - theirs) <= _EQUAL


def _disagreement(measured: _Precision, errors: DetectorErrors) -> str:
    """Describes the first AP for which hotcoco and pycocotools differ; "" if there is none."""
    for name, value in measured.metrics.items():
        if not _same(value, errors.metrics[name]):
            return f"{name} {errors.metrics[name]:.4f} instead of {value:.4f}"
    for key, value in measured.class_ap.items():
        if not _same(value, errors.class_ap[key]):
            return f"AP {errors.class_ap[key]:.4f} for category {key} instead of {value:.4f}"
    return ""


def _error_table(errors: Mapping[str, DetectorErrors], score: float, title: str) -> Table:
    columns, several = ["kind"], len(errors) > 1
    for name in errors:
        suffix = f" ({name})" if several else ""
        columns += [f"{what}{suffix}" for what in ("all", "AP50 to gain", f"score >= {score:g}")]
    rows = []
    for kind, name in KINDS.items():
        cells = [
            cell
            for each in errors.values()
            for cell in (each.counts[kind], f"{each.gains[kind]:.2f}", each.shown_counts[kind])
        ]
        rows.append((name, cells))
    note = (
        "TIDE's kinds. class: IoU of at least 0.5 with an object of another class; location: IoU "
        "0.1 to 0.5 with an object of its class; both: IoU 0.1 to 0.5 with an object of another "
        "class; duplicate: of an object that a better detection matches; background: IoU below 0.1 "
        "with all objects; missed: objects that no detection matches and no class or location "
        "error belongs to. AP50 to gain: how much AP50 would rise without these errors."
    )
    return Table(f"Errors by kind: {title}", columns, rows, note)


def _confusion_section(name: str, errors: DetectorErrors, truth: _Truth, score: float) -> Section:
    names = [truth.names[truth.ids.index(key)] for key in errors.category_ids]
    note = (
        f"Detections with a score of at least {score:g} and objects, matched at an IoU of 0.5 or "
        "more. Last row: detections without an object. Last column: objects that were missed."
    )
    labels = [*names, _BACKGROUND]
    return confusion_section(f"Confusion: {name}", labels, labels, errors.confusion, note)


def _calibration_section(errors: Mapping[str, DetectorErrors], title: str) -> Section:
    lines = [Line("score = precision", [0, 1], [0, 1])]
    rows = []
    for name, each in errors.items():
        score, precision, number = (
            zip(*each.calibration, strict=True) if each.calibration else ((),) * 3
        )
        label = f"{name}, error {each.calibration_error:.3f}"
        lines.append(Line(label, score, precision))
        rows += [
            (f"{name}: {s:.3f}", {"precision": p, "detections": n})
            for s, p, n in zip(score, precision, number, strict=True)
        ]
    caption = (
        "All detections in ten bins of score: their mean score, and the share that matches an "
        "object at an IoU of 0.5. The error is the mean distance from the diagonal."
    )
    plot = Plot("Precision by score", "score", "precision", lines, caption)
    columns = ["mean score", "precision", "detections"]
    return Curves(f"Calibration: {title}", [plot], columns, rows)


# --- images --------------------------------------------------------------------------------------


def _kinds(counts: Mapping[str, int]) -> list[str]:
    return [name for kind, name in KINDS.items() if counts[kind]]


def _image(
    truth: _Truth,
    image: int,
    objects: Sequence[dict],
    shown: Sequence[dict],
    errors: DetectorErrors,
) -> ReportImage:
    """Returns an image with its boxes, but without its pixels."""

    def box(item: dict, wrong: bool) -> Box:
        x, y, width, height = item["bbox"]
        index = truth.ids.index(item["category_id"])
        return Box((x, y, x + width, y + height), index, item.get("score"), wrong)

    counts = errors.image_counts[image]
    right = errors.right.get(image, set())
    boxes = {
        "Truth": [box(each, each["id"] not in errors.found) for each in objects],
        "Predictions": [box(each, place not in right) for place, each in enumerate(shown)],
    }
    told = [f"{counts[kind]} {name}" for kind, name in KINDS.items() if counts[kind]]
    used = {each.class_index for view in boxes.values() for each in view}
    return ReportImage(
        name=truth.images[image]["file_name"],
        image=np.zeros((1, 1, 3), np.uint8),
        views=boxes,
        note=", ".join(told) or "no error",
        classes=[truth.names[index] for index in sorted(used)],
        errors=_kinds(counts) or ["no error"],
    )


def _gallery_section(
    name: str,
    truth: _Truth,
    rows: Sequence[dict],
    errors: DetectorErrors,
    score: float,
    settings: GallerySettings,
) -> Section:
    objects: dict[int, list[dict]] = {}
    for each in truth.content["annotations"]:
        if not each.get("iscrowd"):
            objects.setdefault(each["image_id"], []).append(each)
    shown: dict[int, list[dict]] = {}
    for each in rows:
        if each["score"] >= score:
            shown.setdefault(each["image_id"], []).append(each)
    number = {image: sum(each.values()) for image, each in errors.image_counts.items()}
    worst, best = choose_images(
        number, {image: len(objects.get(image, ())) for image in number}, settings.images
    )
    images = [
        _image(truth, image, objects.get(image, ()), shown.get(image, ()), errors)
        for image in [*worst, *best]
    ]
    note = (
        f"The images with the most errors, then {len(best)} without errors. Detections with a "
        f"score of at least {score:g}. Broken outlines: false detections and missed objects."
    )
    return build_gallery(
        f"Worst and best images: {name}",
        images,
        truth.source.image_root,
        truth.names,
        note,
        settings,
    )


# --- all sections --------------------------------------------------------------------------------


def _counted(
    truth: _Truth,
    files: Mapping[str, Path],
    measured: Mapping[str, _Precision],
    settings: ErrorSettings,
) -> tuple[dict[str, DetectorErrors], list[str]]:
    """Returns hotcoco's counts for runs whose AP equals pycocotools', and notes on the others."""
    if not has_hotcoco():
        return {}, [
            "Errors by kind, confusion, calibration, intervals and images need hotcoco: "
            "pip install 'contnet[analysis]'"
        ]
    try:
        every = count_errors(
            truth.source.json_file, [str(files[name]) for name in measured], settings
        )
    except UserError as error:
        return {}, [str(error)]
    counted, notes = {}, []
    for name, errors in zip(measured, every, strict=True):
        if reason := _disagreement(measured[name], errors):
            notes.append(
                f"{name}: hotcoco has {reason} from pycocotools, so its counts are left out. It "
                "matches objects with the annotation id 0, which pycocotools counts as missed "
                "(tools/doctor.py reports them)."
            )
        else:
            counted[name] = errors
    return counted, notes


def detection_sections(
    title: str,
    source: CocoSource,
    files: Mapping[str, Path],
    errors: ErrorSettings,
    gallery: GallerySettings,
) -> list[Section]:
    """Returns sections about the boxes of runs on one data set.

    Args:
        title: name of the data set.
        source: its annotation file and images.
        files: results in COCO's format, by run; later runs are compared with the first one.
        errors: how errors are counted.
        gallery: number and size of the images.

    Returns:
        Sections; the last one gives the reasons for parts that are left out.
    """
    try:
        truth = _read_truth(source)
    except UserError as error:
        return [Notes(f"Detections: {title}", [f"{error}. Parts that need it are left out."])]
    rows, measured, notes = {}, {}, []
    for name, file in files.items():
        try:
            rows[name] = _read_detections(file, truth)
        except UserError as error:
            notes.append(f"{name}: {error}")
            continue
        measured[name] = _measure(truth, rows[name], errors.limit)
    if not measured:
        return [Notes(f"Detections: {title}", notes)]
    facts = {
        f"{metric} of {name}": value
        for name, each in measured.items()
        for metric, value in each.metrics.items()
    }
    counted, told = _counted(truth, files, measured, errors)
    sections: list[Section] = [Facts(f"Boxes of the last evaluation: {title}", facts)]
    first = next(iter(measured))
    differences = {name: each.differences for name, each in counted.items() if each.differences}
    if differences and first in counted:
        sections.append(difference_table(title, first, differences, errors.resamples, errors.seed))
    sections.append(_precision_section(measured, truth, title))
    if counted:
        sections += [
            _error_table(counted, errors.score, title),
            _calibration_section(counted, title),
        ]
    for name, each in counted.items():
        sections.append(_confusion_section(name, each, truth, errors.score))
    for name, each in counted.items():
        sections.append(_gallery_section(name, truth, rows[name], each, errors.score, gallery))
    if notes or told:
        sections.append(Notes(f"Left out: {title}", [*notes, *told]))
    return sections
