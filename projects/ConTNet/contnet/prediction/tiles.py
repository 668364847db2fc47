"""Detection in tiles of large images.

Small objects in a large image vanish when it is resized for the model, so each tile is resized
separately. The model also runs on the whole image. Detections that touch an inner border of their
tile are cut off, and dropped: the object is complete in a neighbouring tile or, if it is larger
than the overlap, in the whole image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import batched_nms

from contnet.prediction.predictor import Predictor
from contnet.utils.errors import UsageError

__all__ = ["check_tiles", "predict_tiled"]

_CUT = 2.0  # maximum distance of a cut-off detection from its tile's border, in pixels
_SAME = 0.5  # IoU above which two detections belong to the same object


def check_tiles(model: Predictor, size: int, overlap: int) -> None:
    """Raises UsageError unless a model can run on tiles of this size."""
    if model.task != "detection":
        raise UsageError(f"tiles are for detectors, but {model.source} is a {model.task} model")
    if size < 16 or not 0 <= overlap < size:
        raise UsageError(
            f"tiles of {size} pixels that overlap by {overlap}: the size must be 16 or more, the "
            "overlap less than the size"
        )


def _starts(length: int, size: int, overlap: int) -> list[int]:
    """Returns the start positions of tiles; the last one ends at the image's border."""
    last = max(length - size, 0)
    return sorted({min(start, last) for start in range(0, last + size - overlap, size - overlap)})


class _Look(NamedTuple):
    """A part of an image, and the model's detections in it."""

    left: int
    top: int
    width: int
    height: int
    found: dict

    @property
    def offset(self) -> np.ndarray:
        return np.array([self.left, self.top, self.left, self.top], np.float32)


def _is_whole(look: _Look, shape: tuple[int, int]) -> np.ndarray:
    """Returns which detections (N,) touch no inner border of their tile."""
    boxes, (rows, columns) = look.found["boxes"], shape
    whole = np.ones(len(boxes), bool)
    if look.left:
        whole &= boxes[:, 0] > _CUT
    if look.top:
        whole &= boxes[:, 1] > _CUT
    if look.left + look.width < columns:
        whole &= boxes[:, 2] < look.width - _CUT
    if look.top + look.height < rows:
        whole &= boxes[:, 3] < look.height - _CUT
    return whole


def _tiles(
    model: Predictor, image: np.ndarray, size: int, overlap: int, score: float
) -> Iterator[_Look]:
    """Yields the whole image and, if it is larger than a tile, its tiles."""
    rows, columns = image.shape[:2]
    yield _Look(0, 0, columns, rows, model(image, score=score))
    if rows <= size and columns <= size:
        return
    for top in _starts(rows, size, overlap):
        for left in _starts(columns, size, overlap):
            tile = np.ascontiguousarray(image[top : top + size, left : left + size])
            height, width = tile.shape[:2]
            yield _Look(left, top, width, height, model(tile, score=score))


def predict_tiled(
    model: Predictor, image: np.ndarray, size: int, overlap: int, score: float = 0.0
) -> dict:
    """Runs a detector on an image and on its tiles, and merges the detections.

    Args:
        model: a detector.
        image: uint8 RGB (H, W, 3).
        size: size of a tile, in pixels.
        overlap: overlap of neighbouring tiles, in pixels; objects up to this size are complete in a
            tile.
        score: minimum score.

    Returns:
        The same dict as :class:`Predictor`.
    """
    looks = list(_tiles(model, image, size, overlap, score))
    parts = [
        (look, index)
        for look in looks
        for index in np.flatnonzero(_is_whole(look, image.shape[:2]))
    ]
    if not parts:
        return looks[0].found  # the whole image, which has no complete detections either
    boxes = np.stack([look.found["boxes"][index] + look.offset for look, index in parts])
    scores, classes = (
        np.stack([look.found[key][index] for look, index in parts]) for key in ("scores", "classes")
    )
    kept = batched_nms(*map(torch.from_numpy, (boxes, scores, classes)), _SAME).tolist()
    result = {
        "boxes": boxes[kept],
        "scores": scores[kept],
        "classes": classes[kept],
        "names": [model.class_names[number] for number in classes[kept]],
    }
    if "masks" in looks[0].found:
        result["masks"] = np.zeros((len(kept), *image.shape[:2]), bool)
        for whole, number in zip(result["masks"], kept, strict=True):
            look, index = parts[number]
            whole[look.top : look.top + look.height, look.left : look.left + look.width] = (
                look.found["masks"][index]
            )
    return result
