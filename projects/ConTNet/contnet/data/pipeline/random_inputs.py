"""Random images with random ground truth, as a model's inputs if there is no data set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch import Tensor

from contnet.config.nodes import get_value
from contnet.data.datasets.classes import CLASS_KEYS, IMAGE_LABELS

__all__ = ["random_inputs"]

_OBJECTS = 7  # per image, the mean of COCO
_LEAST_SIDE = 0.02  # of a box, relative to the image's side


def _random_objects(cfg: CfgNode, size: tuple[int, int], classes: int) -> Instances:
    """Returns random boxes; if there are masks, they cover the boxes."""
    height, width = size
    sides = torch.tensor([width, height, width, height])
    corners, extents = torch.rand(_OBJECTS, 2) * 0.7, torch.rand(_OBJECTS, 2) * 0.3
    boxes = torch.cat([corners, corners + extents.clamp(min=_LEAST_SIDE)], 1) * sides
    objects = Instances(size)
    objects.gt_boxes = Boxes(boxes)
    objects.gt_classes = torch.randint(classes, (_OBJECTS,))
    if cfg.MODEL.MASK_ON:
        polygons = [[box[[0, 1, 2, 1, 2, 3, 0, 3]].numpy()] for box in boxes.double()]
        objects.gt_masks = PolygonMasks(polygons)
        if cfg.INPUT.MASK_FORMAT == "bitmask":
            objects.gt_masks = BitMasks.from_polygon_masks(polygons, height, width)
    return objects


def _truths(cfg: CfgNode, size: tuple[int, int]) -> Iterator[tuple[str, Instances | Tensor | int]]:
    """Yields the ground truth that training needs besides an image, by name."""
    for kind, key in CLASS_KEYS[cfg.MODEL.META_ARCHITECTURE].items():
        classes = get_value(cfg, key)
        if kind == "objects":
            yield "instances", _random_objects(cfg, size, classes)
        elif kind == IMAGE_LABELS:
            yield "label", int(torch.randint(classes, ()))
        else:
            yield "sem_seg", torch.randint(classes, size)


def random_inputs(cfg: CfgNode, number: int, size: tuple[int, int], seed: int = 0) -> list[dict]:
    """Returns inputs for training and prediction with the config's model.

    Args:
        cfg: config of a model in ``CLASS_KEYS``; determines the ground truth and its classes.
        number: number of images.
        size: height and width in pixels.
        seed: seed of images and ground truth.

    Returns:
        Detectron2's dict for each image: ``image`` (uint8, channels x H x W), its ``height`` and
        ``width``, and the ground truth.
    """
    height, width = size
    channels = len(cfg.MODEL.PIXEL_MEAN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [
            {
                "image": torch.randint(256, (channels, *size), dtype=torch.uint8),
                "height": height,
                "width": width,
                **dict(_truths(cfg, size)),
            }
            for _ in range(number)
        ]
