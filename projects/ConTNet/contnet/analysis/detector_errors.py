"""Counts by hotcoco: errors by kind, confusion, calibration, differences between runs.

hotcoco (MIT, https://github.com/derekallman/hotcoco) hangs in a process that is forked after its
first use. So :func:`count_errors` runs it in a separate, spawned process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import numpy as np

from contnet.utils.errors import UserError

__all__ = ["KINDS", "DetectorErrors", "ErrorSettings", "count_errors", "has_hotcoco"]

# TIDE's names of errors (Bolya et al., 2020, arXiv 2008.08115) and ours.
KINDS = {
    "Cls": "class",
    "Loc": "location",
    "Both": "both",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}


@dataclass(frozen=True)
class ErrorSettings:
    """How detections are counted.

    Attributes:
        limit: maximum number of detections per image (and class), TEST.DETECTIONS_PER_IMAGE.
        score: minimum score of the detections that are shown and in the confusion matrix.
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.
    """

    limit: int = 100
    score: float = 0.5
    resamples: int = 200
    seed: int = 0


@dataclass(frozen=True)
class DetectorErrors:
    """Counts of a run's boxes.

    Attributes:
        metrics: AP, AP50, ... in percent, as hotcoco computes them.
        class_ap: AP in percent by category id.
        counts: errors by TIDE's kinds, for all detections.
        gains: by kind, how much AP50 would rise in percent without these errors.
        shown_counts: errors by kind, for the detections with at least the minimum score.
        image_counts: these errors by image id, then by kind.
        confusion: (K + 1, K + 1), rows are the truth, the last row and column the background.
        category_ids: categories of the first K rows and columns, in order.
        right: by image id, the indices of shown detections that match an object.
        found: ids of the objects that a shown detection matches.
        calibration: bins of all detections: mean score, share of correct detections, number.
        calibration_error: the expected calibration error, in 0..1.
        differences: difference from the first run, and lower and upper end of its 95 % interval, in
            percent by metric; {} for the first run.
    """

    metrics: dict[str, float]
    class_ap: dict[int, float]
    counts: dict[str, int]
    gains: dict[str, float]
    shown_counts: dict[str, int]
    image_counts: dict[int, dict[str, int]]
    confusion: np.ndarray
    category_ids: list[int]
    right: dict[int, set[int]]
    found: set[int]
    calibration: list[tuple[float, float, int]]
    calibration_error: float
    differences: dict[str, tuple[float, float, float]]


def has_hotcoco() -> bool:
    """Whether hotcoco is installed."""
    return find_spec("hotcoco") is not None


# --- in the spawned process ----------------------------------------------------------------------


def _evaluate(hotcoco: Any, truth: Any, detections: list[dict], limit: int) -> Any:
    evaluation = hotcoco.COCOeval(truth, truth.load_res(detections), "bbox")
    if limit != 100:
        evaluation.params.maxDets = sorted((1, 10, limit))
    evaluation.evaluate()
    return evaluation


def _image_counts(evaluation: Any, images: Sequence[int]) -> dict[int, dict[str, int]]:
    counts = {}
    for image in images:
        evaluation.params.imgIds = [image]
        evaluation.evaluate()
        counts[image] = evaluation.tide_errors()["counts"]
    return counts


def _percent(metrics: dict[str, float]) -> dict[str, float]:
    return {key: 100 * value if value >= 0 else float("nan") for key, value in metrics.items()}


def _differences(hotcoco: Any, first: Any, other: Any, settings: ErrorSettings) -> dict:
    compared = hotcoco.compare(
        first, other, n_bootstrap=settings.resamples, seed=settings.seed, confidence=0.95
    )
    return {
        key: tuple(
            100 * value
            for value in (
                compared["deltas"][key],
                compared["ci"][key]["lower"],
                compared["ci"][key]["upper"],
            )
        )
        for key in compared["metric_keys"]
        if min(compared["metrics_a"][key], compared["metrics_b"][key]) >= 0
    }


def _summarise(
    hotcoco: Any, truth: Any, evaluation: Any, detections: list[dict], settings: ErrorSettings
) -> dict:
    """Returns the fields of :class:`DetectorErrors` for a run, except differences."""
    evaluation.accumulate()
    evaluation.summary_lines()
    tide, calibration = evaluation.tide_errors(), evaluation.calibration()
    confusion = evaluation.confusion_matrix(min_score=settings.score)
    shown = [each for each in detections if each["score"] >= settings.score]
    seen = _evaluate(hotcoco, truth, shown, settings.limit)
    status, places = seen.image_diagnostics(), {}
    right: dict[int, set[int]] = {}
    # Detections are numbered from 1.
    for number, each in enumerate(shown, 1):
        place = places[each["image_id"]] = places.get(each["image_id"], -1) + 1
        if status["dt_status"].get(number) == "tp":
            right.setdefault(each["image_id"], set()).add(place)
    # hotcoco's own table of classes is keyed by name, but names may repeat.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    known = [precision[:, :, k][precision[:, :, k] > -1] for k in range(precision.shape[2])]
    ids = list(evaluation.params.catIds)
    return {
        "metrics": _percent(evaluation.get_results()),
        "class_ap": {
            key: 100 * float(values.mean()) if values.size else float("nan")
            for key, values in zip(ids, known, strict=True)
        },
        "counts": tide["counts"],
        "gains": {kind: 100 * tide["delta_ap"][kind] for kind in KINDS},
        "shown_counts": seen.tide_errors()["counts"],
        "found": {key for key, each in status["gt_status"].items() if each == "matched"},
        "confusion": np.asarray(confusion["matrix"], dtype=np.int64),
        "category_ids": list(confusion["cat_ids"]),
        "right": right,
        "calibration": [
            (each["avg_confidence"], each["avg_accuracy"], each["count"])
            for each in calibration["bins"]
            if each["count"]
        ],
        "calibration_error": calibration["ece"],
        "image_counts": _image_counts(seen, seen.params.imgIds),
    }


def _count(truth_file: str, detection_files: Sequence[str], settings: ErrorSettings) -> list[dict]:
    import hotcoco

    truth = hotcoco.COCO(truth_file)
    counted, first = [], None
    for file in detection_files:
        with open(file) as stream:
            detections = json.load(stream)
        evaluation = _evaluate(hotcoco, truth, detections, settings.limit)
        differences = {}
        if first is None:
            first = evaluation
        else:
            differences = _differences(hotcoco, first, evaluation, settings)
        summary = _summarise(hotcoco, truth, evaluation, detections, settings)
        counted.append({**summary, "differences": differences})
    return counted


# --- in this process -----------------------------------------------------------------------------


def count_errors(
    truth_file: str, detection_files: Sequence[str], settings: ErrorSettings
) -> list[DetectorErrors]:
    """Counts the errors of runs that were evaluated on the same data set.

    Args:
        truth_file: the annotation file, in COCO's format.
        detection_files: the results file of each run, in COCO's format.
        settings: how to count.

    Raises:
        UserError: if hotcoco is not installed or cannot read the files.
    """
    if not has_hotcoco():
        raise UserError("hotcoco is not installed: pip install 'contnet[analysis]'")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            counted = pool.submit(_count, truth_file, list(detection_files), settings).result()
        except BrokenProcessPool as error:
            raise UserError(
                "the process that counts errors was killed, perhaps because it ran out of memory"
            ) from error
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"hotcoco cannot read {truth_file} ({reason})") from error
    return [DetectorErrors(**each) for each in counted]
