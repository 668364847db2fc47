"""Checks the masks of an annotation file in COCO format."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from contnet.data.datasets.coco import is_whole
from contnet.data.findings import Findings

__all__ = [
    "FIX_HINT",
    "DatasetUse",
    "are_numbers",
    "check_mask",
    "flatten_polygons",
    "is_mask_of",
    "is_text_of_numbers",
    "usable_polygons",
]

_NUMBERS = {int, float}
_DIGITS = 7  # of a number of 32 bits in a compressed mask, at most
FIX_HINT = "tools/doctor.py --fix fixes it in a copy"


@dataclass(frozen=True)
class DatasetUse:
    """How a run uses a data set.

    Attributes:
        trained: whether it is in DATASETS.TRAIN.
        evaluated: whether it is in DATASETS.TEST.
        masks: MODEL.MASK_ON.
        bitmasks: whether INPUT.MASK_FORMAT is bitmask.
        filtered: DATALOADER.FILTER_EMPTY_ANNOTATIONS.
    """

    trained: bool
    evaluated: bool
    masks: bool
    bitmasks: bool
    filtered: bool = True


def are_numbers(values: Iterable) -> bool:
    """Whether all values are finite numbers; true and false are not."""
    values = list(values)
    try:
        return _NUMBERS.issuperset(map(type, values)) and math.isfinite(sum(map(abs, values)))
    except OverflowError:
        return False


def is_text_of_numbers(values: Iterable) -> bool:
    """Whether some of the values are strings, and all of them can be read as numbers."""
    try:
        return any(isinstance(value, str) for value in values) and are_numbers(map(float, values))
    except (OverflowError, TypeError, ValueError):
        return False


def usable_polygons(mask: list) -> list[list]:
    """Returns the polygons of a mask that Detectron2 keeps."""
    return [part for part in mask if len(part) >= 6 and not len(part) % 2]


def flatten_polygons(mask: list) -> list | None:
    """Converts one polygon outside a list, or lists of points [x, y], to COCO's polygons.

    Returns:
        The polygons; None if the mask has neither of these forms.
    """
    if are_numbers(mask) and mask:
        return [mask]
    parts = [mask] if mask and all(map(_is_point, mask)) else mask
    if parts and all(map(_is_line, parts)):
        return [[value for point in part for value in point] for part in parts]
    return None


def _is_point(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and are_numbers(value)


def _is_line(value: object) -> bool:
    return isinstance(value, list) and len(value) > 2 and all(map(_is_point, value))


def _check_polygons(polygons: list, where: str, findings: Findings) -> bool:
    """Checks polygons; returns whether all are lists of finite numbers."""
    sound = True
    for polygon in polygons:
        if not isinstance(polygon, list) or not are_numbers(polygon):
            texts = isinstance(polygon, list) and is_text_of_numbers(polygon)
            hint = f", but strings: {FIX_HINT}" if texts else ""
            what = f"polygons that are not lists [x, y, x, y, ...] of finite numbers{hint}"
            findings.error(what, where)
            sound = False
        elif len(polygon) % 2:
            findings.lost("polygons with an odd number of coordinates", where)
        elif len(polygon) < 6:
            findings.lost("polygons of fewer than 3 points", where)
    return sound


def _is_short(polygon: object) -> bool:
    return isinstance(polygon, list) and len(polygon) < 6


def _run_lengths(counts: str) -> np.ndarray:
    """Returns the run lengths of a compressed mask.

    Their digits have 5 bits; from the fourth run on, the difference to the run two places before
    is stored.

    Raises:
        ValueError: if the text is not valid; pycocotools' C code does not check it.
    """
    digits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    last = digits & 32 == 0  # digit of its run
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or not last[-1]:
        raise ValueError("not a compressed mask, or truncated")
    ends = np.flatnonzero(last) + 1
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    if lengths.max() > _DIGITS:
        raise ValueError("an invalid run length")
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 31) << 5 * places, starts)
    runs -= (digits[ends - 1] & 16 != 0).astype(np.int64) << 5 * lengths
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


def _read_runs(counts: object) -> np.ndarray:
    """Returns the run lengths of a mask, compressed or not; ValueError if they are not valid."""
    if isinstance(counts, str):
        return _run_lengths(counts)
    if isinstance(counts, list):
        counts = [int(n) if type(n) is float and n.is_integer() else n for n in counts]
    if not isinstance(counts, list) or set(map(type, counts)) != {int}:
        raise ValueError("not a list of integers")
    return np.array(counts, np.int64)


def is_mask_of(mask: dict, size: tuple) -> bool:
    """Whether a run-length mask fits an image of (width, height).

    pycocotools allocates the size that a mask states, and counts pixels in 32 bits.
    """
    width, height = size
    pixels = width * height
    if mask.get("size") != [height, width] or not all(map(is_whole, mask["size"])):
        return False
    try:
        runs = _read_runs(mask.get("counts"))
    except (OverflowError, ValueError):
        return False
    within = pixels < 2**32 and runs.min() >= 0 and runs.max() <= pixels
    return bool(within and runs.sum() == pixels)


def check_mask(item: dict, size: tuple, use: DatasetUse, where: str, findings: Findings) -> bool:
    """Checks the mask of an object in an image of (width, height).

    Returns:
        Whether the object can be measured; one without a mask can.
    """
    mask = item.get("segmentation")
    if not mask:
        if use.masks and (use.evaluated or not item.get("iscrowd")):
            findings.error(
                "objects without a mask, which MODEL.MASK_ON requires: set MODEL.MASK_ON False, or "
                "use a box detector",
                where,
            )
        return True
    if isinstance(mask, dict):
        if not is_mask_of(mask, size):
            findings.error("run-length masks that do not fit their image's size", where)
            return False
        if use.masks and use.trained and not use.bitmasks and not item.get("iscrowd"):
            findings.error("run-length masks of objects: set INPUT.MASK_FORMAT bitmask", where)
        return True
    if isinstance(mask, list):
        if flatten_polygons(mask):
            findings.error(
                "masks that are one list of numbers, or of points [x, y], instead of polygons "
                f"[[x, y, x, y, ...], ...]: {FIX_HINT}",
                where,
            )
            return False
        if use.evaluated and use.masks and any(_is_short(polygon) for polygon in mask):
            findings.error("polygons of fewer than 3 points, which evaluation misreads", where)
        return _check_polygons(mask, where, findings)
    findings.error("masks that are neither polygons nor run-length", where)
    return False
