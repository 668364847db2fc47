"""Tests tiles on images with known truth, with a detector of large enough white areas."""

import cv2
import numpy as np
import pytest
import torch
from conftest import SMALL
from detectron2.structures import Boxes, Instances
from leaves import CONFIGS, TINY
from torch import nn

import contnet
from contnet.prediction.predictor import Predictor
from contnet.prediction.tiles import check_tiles, predict_tiled
from contnet.utils.errors import UsageError

SMALLEST = 6  # minimum size of an object in the detector's input, in pixels


class WhiteThings(nn.Module):
    """Finds connected white areas of two classes, flat and high, with their masks."""

    def forward(self, batch: list[dict]) -> list[dict]:
        return [{"instances": self._find(each)} for each in batch]

    def _find(self, each: dict) -> Instances:
        image = each["image"].numpy()[0]
        scale = each["width"] / image.shape[1]
        number, labels, stats, _ = cv2.connectedComponentsWithStats((image > 127).astype(np.uint8))
        found = [k for k in range(1, number) if min(stats[k, 2:4]) >= SMALLEST]
        boxes = stats[found, :4].astype(np.float32).reshape(-1, 4)
        result = Instances((each["height"], each["width"]))
        boxes[:, 2:] += boxes[:, :2]
        result.pred_boxes = Boxes(torch.from_numpy(boxes * scale))
        result.scores = torch.full((len(found),), 0.9)
        sizes = stats[found, 2:4].reshape(-1, 2)
        result.pred_classes = torch.from_numpy((sizes[:, 1] > sizes[:, 0]).astype(np.int64))
        size = (each["width"], each["height"])
        masks = [cv2.resize((labels == k).astype(np.uint8), size, interpolation=0) for k in found]
        result.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, *size[::-1]))
        return result


@pytest.fixture(scope="module")
def model() -> Predictor:
    # All inputs are resized to 100 pixels.
    sizes = ["INPUT.MIN_SIZE_TEST", "100", "INPUT.MAX_SIZE_TEST", "100"]
    cfg = contnet.load_config(str(CONFIGS / "mask_rcnn_contti.yaml"), [*SMALL, *TINY, *sizes])
    return Predictor(cfg, WhiteThings(), ["flat", "high"])


def draw(boxes: list[tuple[int, int, int, int]], shape: tuple[int, int]) -> np.ndarray:
    image = np.zeros((*shape, 3), np.uint8)
    for left, top, right, bottom in boxes:
        image[top:bottom, left:right] = 255
    return image


# Small objects anywhere, across borders of tiles, in a corner; and one larger than a tile.
SMALL_THINGS = [(13, 20, 33, 32), (95, 50, 115, 62), (240, 190, 252, 218), (380, 0, 400, 12)]
LARGE = (40, 100, 200, 280)


@pytest.mark.parametrize("size", [100, 128])
def test_each_object_once(model, size):
    image = draw([*SMALL_THINGS, LARGE], (300, 400))
    alone = model(image)
    assert len(alone["boxes"]) == 1  # the large one; the others vanish
    found = predict_tiled(model, image, size, 40)
    order = np.lexsort(found["boxes"].T[::-1])
    expected = np.array(sorted([*SMALL_THINGS, LARGE]))
    assert found["boxes"][order] == pytest.approx(expected, abs=4)
    names = [found["names"][index] for index in order]
    sides = expected[:, 2:] - expected[:, :2]
    assert names == ["high" if height > width else "flat" for width, height in sides]
    for box, mask in zip(found["boxes"].round().astype(int), found["masks"], strict=True):
        assert mask.shape == (300, 400)
        rows, columns = np.nonzero(mask)
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert extent == pytest.approx(box, abs=4)


def test_what_fits_a_tile_is_looked_at_once(model):
    image = draw([(10, 10, 40, 30)], (90, 100))
    whole, tiled = model(image), predict_tiled(model, image, 100, 20)
    assert (whole["boxes"] == tiled["boxes"]).all() and len(tiled["masks"]) == 1


def test_nothing(model):
    found = predict_tiled(model, draw([], (300, 400)), 100, 20)
    assert found["boxes"].shape == (0, 4) and found["names"] == []


@pytest.mark.parametrize(("size", "overlap"), [(8, 0), (100, 100), (100, -1)])
def test_tiles_that_cannot_be(model, size, overlap):
    with pytest.raises(UsageError, match="tiles"):
        check_tiles(model, size, overlap)
