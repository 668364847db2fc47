"""Checks whether areas, boxes and masks of objects agree, for many objects at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import numpy as np
import pycocotools.mask as mask_util

from contnet.data.findings import Findings
from contnet.data.validation.masks import usable_polygons

__all__ = ["Geometry", "describe_object", "is_far"]

_BATCH = 2000  # objects that are compared at a time
# Pixels by which a box may miss its mask: whole pixels on either side.
_ROUNDING = 2.0
_SLACK = 0.1  # relative difference of areas that agree
_LEAST = 0.01  # least share of its box that a mask fills
_FEW = 20  # fewer areas than these show no rule

_ZERO = "areas of 0: APs, APm and APl need the areas, doctor.py --fix computes them"
_ABOVE = (
    "areas above width x height of their box: APs, APm and APl need correct areas, doctor.py --fix "
    "computes them"
)
_OTHER = (
    "areas that differ from the masks': APs, APm and APl need correct areas, doctor.py --fix "
    "computes them"
)
_OTHER_BOX = (
    "areas of objects without masks that are not width x height: APs, APm and APl need correct "
    "areas, doctor.py --fix computes them"
)
_FAR = "polygons that reach far outside their image"
_NOT_HELD = "boxes that do not contain their mask"
_LARGER = "boxes far larger than their mask"


def describe_object(item: dict) -> str:
    """Returns the ids of an annotation, for a message."""
    return f"annotation {item['id']} of image {item['image_id']}"


def is_far(low: float, high: float, side: int) -> bool:
    """Whether coordinates exceed an image by more than half of its side; also for arrays."""
    return (low < -0.5 * side) | (high > 1.5 * side)


class _Masks(NamedTuple):
    """Measures of N masks; corners and areas in pixels.

    Attributes:
        corners: x0, y0, x1, y1 of the box around each mask, (N, 4).
        least: minimum area of each mask, (N,).
        most: maximum area of each mask, (N,); its parts may overlap.
        blur: area that rounding to pixels may add or remove, (N,).
    """

    corners: np.ndarray
    least: np.ndarray
    most: np.ndarray
    blur: np.ndarray


def _measure_polygons(masks: list[list[list[float]]]) -> _Masks:
    """Measures masks that have at least one usable polygon each."""
    objects = [usable_polygons(mask) for mask in masks]
    parts = [polygon for polygons in objects for polygon in polygons]
    counts = np.fromiter(map(len, parts), int, len(parts))
    points = np.fromiter(chain.from_iterable(parts), float, counts.sum()).reshape(-1, 2)
    starts = np.concatenate([[0], np.cumsum(counts // 2)[:-1]])
    following = np.arange(1, len(points) + 1)
    following[np.append(starts[1:], len(points)) - 1] = starts
    x, y = points.T
    x2, y2 = points[following].T
    areas = np.abs(np.add.reduceat(x * y2 - x2 * y, starts)) / 2
    lengths = np.add.reduceat(np.hypot(x2 - x, y2 - y), starts)
    of_object = np.fromiter(map(len, objects), int, len(objects))
    first = np.concatenate([[0], np.cumsum(of_object)[:-1]])
    low = np.minimum.reduceat(np.minimum.reduceat(points, starts), first)
    high = np.maximum.reduceat(np.maximum.reduceat(points, starts), first)
    return _Masks(
        np.concatenate([low, high], axis=1),
        np.maximum.reduceat(areas, first),
        np.add.reduceat(areas, first),
        np.add.reduceat(lengths, first) / 2,
    )


def _measure_rle(masks: list[dict]) -> _Masks:
    """Measures run-length masks that fit their images."""
    compressed = [
        mask_util.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask
        for mask in masks
    ]
    boxes = mask_util.toBbox(compressed)
    areas = mask_util.area(compressed).astype(float)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return _Masks(corners, areas, areas, boxes[:, 2:].sum(axis=1))


class _Queue:
    """Objects with one kind of mask, which are compared together."""

    def __init__(self, measure: Callable[[list], _Masks] | None):
        self.measure = measure
        self.items: list[dict] = []
        self.sizes: list[tuple[int, int]] = []


class Geometry:
    """Compares the objects of a file in batches; :meth:`finish` compares the rest.

    Args:
        findings: receives what is found.
        evaluated: whether areas are used.

    Attributes:
        doubtful_areas: annotations with wrong areas; None if they are not collected.
    """

    def __init__(self, findings: Findings, evaluated: bool):
        self._findings = findings
        self._tell_of_area = findings.doubt if evaluated else findings.note
        self.doubtful_areas: list[dict] | None = None
        self._queues = [_Queue(_measure_polygons), _Queue(_measure_rle), _Queue(None)]
        self._bare_items: list[dict] = []
        self._bare_areas: list[np.ndarray] = []

    def add(self, item: dict, size: tuple[int, int]) -> None:
        """Adds an object whose box has an area and whose mask has the right form."""
        mask = item.get("segmentation")
        queue = self._queues[2 if not mask else isinstance(mask, dict)]
        queue.items.append(item)
        queue.sizes.append(size)
        if len(queue.items) == _BATCH:
            self._compare(queue)

    def finish(self) -> None:
        """Compares the remaining objects."""
        for queue in self._queues:
            self._compare(queue)
        self._compare_bare()

    @np.errstate(all="ignore")  # overflows of huge numbers, which are outside all images
    def _compare(self, queue: _Queue) -> None:
        if not queue.items:
            return
        items, sizes = queue.items[:], np.array(queue.sizes)
        queue.items.clear()
        queue.sizes.clear()
        boxes = np.array([item["bbox"] for item in items], dtype=float)
        areas = np.array([_number(item.get("area")) for item in items])
        product = boxes[:, 2] * boxes[:, 3]
        # Areas of crowds are not used: evaluation ignores crowds of any size.
        areas[[bool(item.get("iscrowd")) for item in items]] = np.nan
        zero = areas == 0
        # Some areas count both corners: (width + 1) x (height + 1).
        above = areas > 1.01 * product + boxes[:, 2:].sum(axis=1) + 1
        self._tell_area(_ZERO, items, zero)
        self._tell_area(_ABOVE, items, above)
        known = ~(zero | above | np.isnan(areas))
        if queue.measure is None:
            self._bare_items += [item for item, good in zip(items, known, strict=True) if good]
            self._bare_areas.append(np.stack([areas, product], axis=1)[known])
            return
        measured = queue.measure([item["segmentation"] for item in items])
        self._compare_boxes(items, boxes, sizes, measured)
        slack = _SLACK * measured.most + measured.blur + 1
        other = (areas < measured.least - slack) | (areas > measured.most + slack)
        self._tell_area(_OTHER, items, known & other)

    def _compare_boxes(
        self, items: list[dict], boxes: np.ndarray, sizes: np.ndarray, measured: _Masks
    ) -> None:
        low, high = measured.corners[:, :2], measured.corners[:, 2:]
        far = is_far(low, high, sizes).any(axis=1)
        self._tell(self._findings.error, _FAR, items, far)
        far |= [bool(item.get("iscrowd")) for item in items]  # they have many parts, some hidden
        # Boxes may end at the image's edge while their masks continue.
        low, high = np.clip(low, 0, sizes), np.clip(high, 0, sizes)
        begin, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        cut = np.clip(begin, 0, sizes), np.clip(end, 0, sizes)
        missed = np.maximum(cut[0] - low, high - cut[1]).max(axis=1) > _ROUNDING
        self._tell(self._findings.doubt, _NOT_HELD, items, missed & ~far)
        excess = (cut[1] - cut[0]) - (high - low)
        larger = (excess > 0.5 * (high - low) + 2 * _ROUNDING).any(axis=1)
        self._tell(self._findings.doubt, _LARGER, items, larger & ~missed & ~far)

    @np.errstate(all="ignore")
    def _compare_bare(self) -> None:
        """Compares areas without masks: they may be width x height, or of masks not in the file."""
        if not self._bare_items:
            return
        areas, products = np.concatenate(self._bare_areas).T
        differs = np.abs(areas - products) > _SLACK * products + 1
        share = areas / products
        one_factor = len(share) >= _FEW and np.ptp(np.quantile(share, [0.1, 0.9])) < 0.01
        if 2 * differs.sum() > len(differs) and not one_factor:  # most belong to masks
            differs &= share < _LEAST
        self._tell_area(_OTHER_BOX, self._bare_items, differs)

    def _tell_area(self, kind: str, items: list[dict], wrong: np.ndarray) -> None:
        self._tell(self._tell_of_area, kind, items, wrong)
        if self.doubtful_areas is not None:
            self.doubtful_areas += [items[row] for row in np.flatnonzero(wrong)]

    @staticmethod
    def _tell(
        add: Callable[[str, str], None], kind: str, items: list[dict], wrong: np.ndarray
    ) -> None:
        for row in np.flatnonzero(wrong):
            add(kind, describe_object(items[row]))


def _number(value: object) -> float:
    """Returns a number as float; NaN for anything else, which is reported elsewhere."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else np.nan
