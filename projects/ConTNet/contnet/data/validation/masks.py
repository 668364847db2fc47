"""What can be wrong with the masks of an annotation file of COCO's form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from contnet.data.datasets.coco import is_whole
from contnet.data.findings import Findings

__all__ = [
    "MEND",
    "DatasetUse",
    "are_numbers",
    "check_mask",
    "flatten_polygons",
    "is_mask_of",
    "is_text_of_numbers",
    "usable_polygons",
]

MEND = "tools/doctor.py --fix mends it in a copy"


@dataclass(frozen=True)
class DatasetUse:
    """What a run wants of a data set.

    Attributes:
        trained: it is one of DATASETS.TRAIN.
        evaluated: it is one of DATASETS.TEST.
        masks: MODEL.MASK_ON.
        bitmasks: INPUT.MASK_FORMAT is bitmask.
        filtered: DATALOADER.FILTER_EMPTY_ANNOTATIONS.
    """

    trained: bool
    evaluated: bool
    masks: bool
    bitmasks: bool
    filtered: bool = True


def are_numbers(values: Iterable) -> bool:
    """Whether all are finite numbers."""
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def is_text_of_numbers(values: Iterable) -> bool:
    """Whether there are texts among the values, and all of them spell numbers."""
    try:
        return any(isinstance(value, str) for value in values) and are_numbers(map(float, values))
    except (TypeError, ValueError):
        return False


def usable_polygons(mask: list) -> list[list]:
    """The polygons of a mask that Detectron2 keeps."""
    return [part for part in mask if len(part) >= 6 and not len(part) % 2]


def flatten_polygons(mask: list) -> list | None:
    """Polygons as COCO has them, of one that is in no list, or of lists of points [x, y].

    Returns:
        None where it is neither of the two.
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
    """Whether all are lists of numbers."""
    sound = True
    for polygon in polygons:
        if not isinstance(polygon, list) or not are_numbers(polygon):
            texts = isinstance(polygon, list) and is_text_of_numbers(polygon)
            hint = f", but texts: {MEND}" if texts else ""
            what = f"polygons that are no lists [x, y, x, y, ...] of finite numbers{hint}"
            findings.error(what, where)
            sound = False
        elif len(polygon) % 2:
            findings.lost("polygons with an odd number of coordinates", where)
        elif len(polygon) < 6:
            findings.lost("polygons of fewer than 3 points", where)
    return sound


def _is_short(polygon: object) -> bool:
    return isinstance(polygon, list) and len(polygon) < 6


def _run_lengths(counts: str) -> list[int]:
    """The runs of a compressed mask: in digits of 5 bits, from the fourth on as the difference to
    the last but one.
    """
    runs, value, shift = [], 0, 0
    for letter in counts:
        digit = ord(letter) - 48
        if not 0 <= digit < 64:
            raise ValueError("a letter that no compressed mask has")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("cut off")
    return runs


def is_mask_of(mask: dict, size: tuple) -> bool:
    """Whether a run-length mask fits an image of (width, height)."""
    width, height = size
    counts = mask.get("counts")
    if mask.get("size") != [height, width] or not all(map(is_whole, mask["size"])):
        return False
    try:
        runs = _run_lengths(counts) if isinstance(counts, str) else counts
        return min(runs) >= 0 and sum(runs) == width * height
    except (TypeError, ValueError):
        return False


def check_mask(item: dict, size: tuple, use: DatasetUse, where: str, findings: Findings) -> bool:
    """Checks the mask of an object in an image of (width, height).

    Returns:
        Whether it can be measured; no mask can.
    """
    mask = item.get("segmentation")
    if not mask:
        if use.masks and (use.evaluated or not item.get("iscrowd")):
            findings.error(
                "objects without a mask, which MODEL.MASK_ON needs: set MODEL.MASK_ON False, or "
                "take a detector of boxes",
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
                "masks that are one list of numbers, or of points [x, y], in the place of polygons "
                f"[[x, y, x, y, ...], ...]: {MEND}",
                where,
            )
            return False
        if use.evaluated and use.masks and any(_is_short(polygon) for polygon in mask):
            findings.error("polygons of fewer than 3 points, which evaluation takes wrongly", where)
        return _check_polygons(mask, where, findings)
    findings.error("masks that are neither polygons nor run-length", where)
    return False
