"""COCO's average precision of boxes and masks: pycocotools' results, computed on whole arrays.

pycocotools matches image by image and class by class in Python. Here the detections of a rank (the
best of each image and class, then the second, ...) are matched together, for all thresholds and
ranges of area at once. tests/evaluation/test_coco.py compares the two.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor

__all__ = ["PAIRS_AT_ONCE", "ArrayEvaluation", "Detections", "Matches", "encode_masks"]

# Approximate number of detection-object pairs compared at once, of about 100 bytes each.
PAIRS_AT_ONCE = 4_000_000


@dataclass
class Detections:
    """Detections in some images, one row per object.

    Attributes:
        images: image ids, (N,).
        categories: category ids, (N,).
        scores: float64 (N,).
        boxes: float64 (N, 4), x, y, width, height in pixels.
        masks: compressed run lengths; None if the model has no masks.
        mask_areas: areas in pixels, (N,); (0,) without masks.
    """

    images: np.ndarray
    categories: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    masks: list[dict] | None
    mask_areas: np.ndarray


@dataclass
class Matches:
    """Matches of the detections, at T thresholds and A ranges of area.

    Attributes:
        outcomes: int8 (T, A, N): 1 correct, -1 wrong, 0 ignored.
        images: index of each detection's image among the sorted ids, (N,).
        categories: index of its category among the sorted ids, (N,).
        ranks: number of better detections in the same image and category, (N,).
        scores: (N,).
    """

    outcomes: np.ndarray
    images: np.ndarray
    categories: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray

    @staticmethod
    def join(parts: Sequence[Matches]) -> Matches:
        """Joins the matches of several processes."""
        names = ("outcomes", "images", "categories", "ranks", "scores")
        return Matches(*(np.concatenate([getattr(p, n) for p in parts], axis=-1) for n in names))


@dataclass
class _Truth:
    """The ground truth, sorted by ``groups``, the number of each pair of image and category."""

    groups: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    numbered: np.ndarray
    annotations: list[dict]


def encode_masks(masks: Tensor) -> list[dict]:
    """Compressed run lengths of boolean masks (N, H, W), with the counts as strings for JSON."""
    number, height, width = masks.shape
    columns = masks.view(torch.uint8).amax(dim=1).numpy()
    plain = []
    for mask, used in zip(masks.numpy(), columns, strict=True):
        # Only the columns from the first to the last with a pixel of the mask are encoded.
        first = int(used.argmax())
        last = width - int(used[::-1].argmax()) if used[first] else first
        inside = np.zeros((last - first) * height + 2, dtype=bool)
        inside[1:-1].reshape(-1, height)[:] = mask[:, first:last].T
        changes = np.flatnonzero(inside[1:] != inside[:-1]) + first * height
        counts = np.diff(np.concatenate([[0], changes, [height * width]]))
        # Without the last count if it is 0, because the mask contains the last pixel.
        plain.append({"size": [height, width], "counts": counts[: np.flatnonzero(counts)[-1] + 1]})
    encoded = rle.frPyObjects(plain, height, width) if number else []
    return [{**each, "counts": each["counts"].decode()} for each in encoded]


def _box_overlaps(found: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU of pairs of XYWH boxes, (P, 4) each; for crowds, the share of the detection inside."""
    lower = np.maximum(found[:, :2], truth[:, :2])
    upper = np.minimum(found[:, :2] + found[:, 2:], truth[:, :2] + truth[:, 2:])
    common = (upper - lower).clip(0).prod(axis=1)
    area = found[:, 2:].prod(axis=1)
    union = np.where(crowd, area, area + truth[:, 2:].prod(axis=1) - common)
    return np.divide(common, union, out=np.zeros_like(common), where=common > 0)


class _Pairs:
    """All pairs of a detection and an object of the same image and category.

    Args:
        groups: sorted groups of the detections, (N,).
        truth: the objects.
    """

    def __init__(self, groups: np.ndarray, truth: _Truth):
        start = np.searchsorted(truth.groups, groups, "left")
        self.count = np.searchsorted(truth.groups, groups, "right") - start
        self.first = np.cumsum(self.count) - self.count
        self.found = np.repeat(np.arange(len(groups)), self.count)
        self.truth = np.arange(len(self.found)) + np.repeat(start - self.first, self.count)

    def mask_overlaps(
        self, groups: np.ndarray, masks: Sequence[dict], truth: _Truth, images: Mapping
    ) -> np.ndarray:
        """Computes the IoU (P,) of the masks, group by group as pycocotools does."""
        blocks = [np.zeros(0)]
        busy = np.flatnonzero(self.count)
        edges = np.flatnonzero(np.diff(groups[busy])) + 1
        for rows in np.split(busy, edges) if len(busy) else []:
            objects = self.truth[self.first[rows[0]] :][: self.count[rows[0]]]
            theirs = [_run_lengths(truth.annotations[i], images) for i in objects]
            crowd = truth.crowd[objects].astype(np.uint8)
            blocks.append(rle.iou([masks[i] for i in rows], theirs, crowd).ravel())
        return np.concatenate(blocks)


def _run_lengths(annotation: dict, images: Mapping[object, dict]) -> dict:
    shape, size = annotation["segmentation"], images[annotation["image_id"]]
    if isinstance(shape, list):
        return rle.merge(rle.frPyObjects(shape, size["height"], size["width"]))
    if isinstance(shape["counts"], list):
        return rle.frPyObjects(shape, size["height"], size["width"])
    return shape


class ArrayEvaluation(COCOevalMaxDets):
    """pycocotools' ``COCOeval`` of boxes or masks, computed on arrays.

    :meth:`evaluate` sets ``matches``, which :meth:`accumulate` uses; processes that evaluate
    different images join their matches in between.

    Args:
        truth: the annotation file.
        detections: detections in any of its images.
        task: bbox or segm.
    """

    def __init__(self, truth: COCO, detections: Detections, task: str):
        super().__init__(truth, None, task)
        self.detections = detections

    def _prepare(self) -> None:
        p = self.params
        p.imgIds, p.catIds = np.unique(p.imgIds).tolist(), np.unique(p.catIds).tolist()
        p.maxDets = sorted(p.maxDets)
        self._images = {each: i for i, each in enumerate(p.imgIds)}
        self._categories = {each: i for i, each in enumerate(p.catIds)}
        self._truth = self._read_truth()
        areas = self._truth.areas
        lower, upper = np.array(p.areaRng, dtype=float).T[:, :, None]
        self._regular = ~(self._truth.crowd | (areas < lower) | (areas > upper))

    def _groups(self, images: Sequence, categories: Sequence) -> np.ndarray:
        """Returns the number of each (image, category) pair; -1 if the pair is not evaluated."""
        image = np.array([self._images.get(each, -1) for each in images], dtype=np.int64)
        category = np.array([self._categories.get(each, -1) for each in categories], dtype=np.int64)
        return np.where((image < 0) | (category < 0), -1, image * len(self._categories) + category)

    def _read_truth(self) -> _Truth:
        annotations = self.cocoGt.dataset["annotations"]
        groups = self._groups(
            [each["image_id"] for each in annotations],
            [each["category_id"] for each in annotations],
        )
        order = np.argsort(groups, kind="stable")
        order = order[groups[order] >= 0]
        annotations = [annotations[i] for i in order]
        return _Truth(
            groups[order],
            np.array([each["bbox"] for each in annotations], dtype=float).reshape(-1, 4),
            np.array([each["area"] for each in annotations], dtype=float),
            np.array([each.get("iscrowd", 0) for each in annotations], dtype=bool),
            np.array([each["id"] for each in annotations]) != 0,
            annotations,
        )

    def evaluate(self) -> None:
        """Matches the detections with the objects; sets ``matches``."""
        self._prepare()
        found = self.detections
        groups = self._groups(found.images.tolist(), found.categories.tolist())
        order = np.lexsort((-found.scores, groups))
        order = order[groups[order] >= 0]
        groups = groups[order]
        ranks = np.arange(len(order)) - np.searchsorted(groups, groups)
        counts = ranks < self.params.maxDets[-1]
        order, groups, ranks = order[counts], groups[counts], ranks[counts]
        outcomes = [np.zeros((len(self.params.iouThrs), len(self.params.areaRng), 0), np.int8)]
        for part in self._parts(groups):
            outcomes.append(self._match_part(groups[part], ranks[part], order[part]))
        images, categories = np.divmod(groups, len(self._categories))
        scores = found.scores[order]
        self.matches = Matches(np.concatenate(outcomes, axis=2), images, categories, ranks, scores)

    def _parts(self, groups: np.ndarray) -> list[slice]:
        """Cuts sorted detections between groups, so that the pairs of a part fit into memory."""
        objects = self._truth.groups
        pairs = np.searchsorted(objects, groups, "right") - np.searchsorted(objects, groups)
        part = (np.cumsum(pairs) // PAIRS_AT_ONCE)[np.searchsorted(groups, groups)]
        edges = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(groups)]
        return [slice(*each) for each in itertools.pairwise(edges)]

    def _match_part(self, groups: np.ndarray, ranks: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Computes outcomes of some groups; ``order`` is the indices of their detections."""
        found, truth = self.detections, self._truth
        pairs = _Pairs(groups, truth)
        if self.params.iouType == "bbox":
            areas = found.boxes[order, 2] * found.boxes[order, 3]
            overlaps = _box_overlaps(
                found.boxes[order[pairs.found]], truth.boxes[pairs.truth], truth.crowd[pairs.truth]
            )
        else:
            areas = found.mask_areas[order]
            masks = [found.masks[i] for i in order]
            overlaps = pairs.mask_overlaps(groups, masks, truth, self.cocoGt.imgs)
        return self._match(pairs, overlaps, ranks, areas)

    def _match(
        self, pairs: _Pairs, overlaps: np.ndarray, ranks: np.ndarray, areas: np.ndarray
    ) -> np.ndarray:
        """Matches each detection, in the order of ranks, to the best free object.

        Objects that count precede ignored ones; then the higher overlap, then the later object in
        the file comes first. Returns the outcomes (T, A, N).
        """
        truth, p = self._truth, self.params
        lower, upper = np.array(p.areaRng, dtype=float).T[:, :, None]
        shape = (len(p.iouThrs), len(p.areaRng))
        outcomes = np.where((areas < lower) | (areas > upper), 0, -1).astype(np.int8)
        outcomes = np.repeat(outcomes[None], shape[0], axis=0)
        # Place of a pair among those of its detection: 1 is the lowest overlap; ties in file order.
        by_place = np.lexsort((pairs.truth, overlaps, pairs.found))
        place = np.empty(len(by_place), dtype=np.int32)
        place[by_place] = np.arange(len(by_place)) - pairs.first[pairs.found] + 1
        many = int(pairs.count.max(initial=0))
        merit = place + many * self._regular[:, pairs.truth].astype(np.int32)
        reached = overlaps >= np.minimum(p.iouThrs, 1 - 1e-10)[:, None]
        taken = np.zeros((*shape, len(truth.groups)), dtype=bool)
        by_rank = np.argsort(ranks[pairs.found], kind="stable")
        edges = np.flatnonzero(np.diff(ranks[pairs.found[by_rank]])) + 1
        for part in np.split(by_rank, edges) if len(by_rank) else []:
            objects, rows = pairs.truth[part], pairs.found[part]
            starts = np.flatnonzero(np.diff(rows, prepend=-1))
            free = truth.crowd[objects] | ~taken[:, :, objects]
            merits = np.where(reached[:, None, part] & free, merit[:, part], 0)
            best = np.maximum.reduceat(merits, starts, axis=2)
            t, a, i = np.nonzero(best)
            best, row = best[t, a, i], rows[starts[i]]
            counted = best > many
            chosen = pairs.truth[by_place[pairs.first[row] + best - many * counted - 1]]
            taken[t, a, chosen] = True
            outcomes[t[~counted], a[~counted], row[~counted]] = 0
            # As in pycocotools, a match with an object whose id is 0 does not count.
            right = counted & truth.numbered[chosen]
            outcomes[t[right], a[right], row[right]] = 1
        return outcomes

    def accumulate(self) -> None:
        """Computes precision over recall of each category from ``matches``; sets ``eval``."""
        p, found = self.params, self.matches
        sizes = (len(p.catIds), len(p.areaRng), len(p.maxDets))
        precision = -np.ones((len(p.iouThrs), len(p.recThrs), *sizes))
        recall = -np.ones((len(p.iouThrs), *sizes))
        order = np.lexsort((found.ranks, found.images, -found.scores, found.categories))
        bounds = np.searchsorted(found.categories[order], np.arange(sizes[0] + 1))
        category = self._truth.groups % max(sizes[0], 1)
        for k in range(sizes[0]):
            rows = order[bounds[k] : bounds[k + 1]]
            objects = self._regular[:, category == k].sum(axis=1)
            for m, most in enumerate(p.maxDets):
                outcomes = found.outcomes[:, :, rows[found.ranks[rows] < most]]
                for a in np.flatnonzero(objects):
                    curve = _curve(outcomes[:, a], objects[a], p.recThrs)
                    precision[:, :, k, a, m], recall[:, k, a, m] = curve
        self.eval = {
            "params": p,
            "counts": list(precision.shape),
            "precision": precision,
            "recall": recall,
        }


def _curve(outcomes: np.ndarray, objects: int, levels: np.ndarray) -> tuple:
    """Returns precision (T, R) at recall levels, and the final recall (T,), of sorted outcomes."""
    precision = np.zeros((len(outcomes), len(levels)))
    if outcomes.shape[1] == 0:
        return precision, np.zeros(len(outcomes))
    right = np.cumsum(outcomes == 1, axis=1)
    wrong = np.cumsum(outcomes == -1, axis=1)
    recall = right / objects
    exact = right / (right + wrong + np.spacing(1))
    best_after = np.maximum.accumulate(exact[:, ::-1], axis=1)[:, ::-1]
    for t, reached in enumerate(recall):
        places = np.searchsorted(reached, levels)
        inside = places < len(reached)
        precision[t, inside] = best_after[t, places[inside]]
    return precision, recall[:, -1]
