"""Test-time augmentation: runs on an image at several sizes, also mirrored, and merges the outputs.

Two-stage detectors use Detectron2's. Dense detectors and semantic segmentors use ours, which only
needs a model's usual output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    DatasetMapperTTA,
    GeneralizedRCNN,
    GeneralizedRCNNWithTTA,
    PanopticFPN,
    SemanticSegmentor,
)
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Instances
from fvcore.transforms import HFlipTransform
from torch import nn

from contnet.modeling.thin_images import keep_a_pixel_in_tta

__all__ = ["DenseDetectorTTA", "SemanticSegmentorTTA", "tta_class"]

# Result of a view: the model's output for one image, and whether the image was mirrored.
View = tuple[dict, bool]


class _TTA(nn.Module, ABC):
    """Wraps a model, with the same inputs and outputs, and runs one view at a time.

    Args:
        cfg: the config, of which TEST.AUG is read.
        model: model whose outputs have each input's ``height`` and ``width``.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        super().__init__()
        self.model = model
        self.mapper = DatasetMapperTTA(cfg)

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        return [self.merge(self._views(image)) for image in batched_inputs]

    def _views(self, image: dict) -> Iterator[View]:
        for view in self.mapper(image):
            transforms = view.pop("transforms").transforms
            (output,) = self.model([view])
            yield output, any(isinstance(each, HFlipTransform) for each in transforms)

    @abstractmethod
    def merge(self, views: Iterable[View]) -> dict:
        """Merges the outputs of all views, in the coordinates of the original image."""


class DenseDetectorTTA(_TTA):
    """Joins the boxes of all views, and applies the model's NMS to each class."""

    def merge(self, views: Iterable[View]) -> dict[str, Instances]:
        found = []
        for output, mirrored in views:
            instances = output["instances"]
            if mirrored:
                boxes = instances.pred_boxes.tensor
                boxes[:, [0, 2]] = instances.image_size[1] - boxes[:, [2, 0]]
            found.append(instances)
        if len(found) == 1:  # the model applied NMS, before it clipped the boxes
            return {"instances": found[0]}
        union = Instances.cat(found)
        keep = batched_nms(
            union.pred_boxes.tensor, union.scores, union.pred_classes, self.model.test_nms_thresh
        )
        return {"instances": union[keep[: self.model.max_detections_per_image]]}


class SemanticSegmentorTTA(_TTA):
    """Averages the class probabilities of all views, (K, height, width), instead of logits."""

    def merge(self, views: Iterable[View]) -> dict[str, torch.Tensor]:
        total, count = 0, 0
        for output, mirrored in views:
            probabilities = output["sem_seg"].float().softmax(dim=0)
            total = total + (probabilities.flip(-1) if mirrored else probabilities)
            count += 1
        return {"sem_seg": total / count}


def tta_class(architecture: str) -> type[nn.Module] | None:
    """Returns the wrapper class, used as ``tta_class(name)(cfg, model)``; None if there is none.

    Args:
        architecture: MODEL.META_ARCHITECTURE.
    """
    model = META_ARCH_REGISTRY.get(architecture)
    # Detectron2's wrapper does not support panoptic models, which derive from GeneralizedRCNN.
    if not isinstance(model, type) or issubclass(model, PanopticFPN):
        return None
    pairs = (
        (GeneralizedRCNN, GeneralizedRCNNWithTTA),
        (DenseDetector, DenseDetectorTTA),
        (SemanticSegmentor, SemanticSegmentorTTA),
    )
    keep_a_pixel_in_tta()
    return next((wrapper for kind, wrapper in pairs if issubclass(model, kind)), None)
