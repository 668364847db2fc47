"""Finds facts about weight files of other libraries from their origin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from detectron2.data import MetadataCatalog
from torch import Tensor

from contnet.checkpoint.detectors import detector_classes, detector_of

__all__ = ["IMAGENET_PIXELS", "Origin", "find_origin"]

_RGB_MEAN, _RGB_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
IMAGENET_PIXELS = {"format": "RGB", "mean": _RGB_MEAN, "std": _RGB_STD}
_BGR = {"format": "BGR", "mean": _RGB_MEAN[::-1]}
_UNSCALED = {**_BGR, "std": [1.0, 1.0, 1.0]}
_SCALED = {**_BGR, "std": [57.375, 57.12, 58.395]}
# Values of Detectron2's "__author__" in files for BGR pixels, most of which are not scaled.
_ZOO = ("detectron2 model zoo", "caffe2", "fair", "msra", "pycls")
# Data sets of the detectors of Detectron2's model zoo, by their number of classes.
_ZOO_DATASETS = {
    80: "coco_2017_train",
    1203: "lvis_v1_train",
    1230: "lvis_v0.5_train",
    8: "cityscapes_fine_instance_seg_train",
    20: "voc_2007_trainval",
}
_CAFFE_STYLE = re.compile(r"style\s*=\s*'caffe'|(?:bgr_)?to_rgb\s*=\s*False")


@dataclass(frozen=True)
class Origin:
    """Facts about a file.

    Attributes:
        maker: library or project that made the file, for messages; "" if unknown.
        detector: library of its pyramid and heads, from :func:`detector_of`.
        pixels: "format", "mean" and "std" of the channels, as in :class:`Metadata`.
        stride_in_1x1: as MODEL.RESNETS.STRIDE_IN_1X1; None if unknown.
        classes: names of the classes, in order; None if unknown.
    """

    maker: str = ""
    detector: str = ""
    pixels: dict[str, str | list[float]] = field(default_factory=dict)
    stride_in_1x1: bool | None = None
    classes: list[str] | None = None


def _grouped(tensors: Mapping[str, Tensor]) -> bool:
    """Whether 3x3 convolutions are grouped, as a ResNeXt's are."""
    middle = re.compile(r".*res2[._]0[._](conv2|branch2b)[._](weight|w)")
    return any(
        middle.fullmatch(name) and value.ndim == 4 and value.shape[0] != value.shape[1]
        for name, value in tensors.items()
    )


def _zoo_classes(tensors: Mapping[str, Tensor]) -> list[str] | None:
    """Returns the classes of a detector from Detectron2's model zoo, found by their number."""
    number = 0
    for name, value in tensors.items():
        if re.fullmatch(r"roi_heads\.box_predictor\.(\d\.)?cls_score\.bias", name):
            number = len(value) - 1
    if {"head.cls_score.bias", "head.bbox_pred.bias"} <= tensors.keys():
        number = len(tensors["head.cls_score.bias"]) * 4 // len(tensors["head.bbox_pred.bias"])
    if number == 1 and any(name.startswith("roi_heads.keypoint_head.") for name in tensors):
        return ["person"]
    dataset = _ZOO_DATASETS.get(number)
    names = MetadataCatalog.get(dataset).get("thing_classes") if dataset else None
    return list(names) if names else None


def _own_pixels(tensors: Mapping[str, Tensor]) -> dict:
    """Returns the pixel statistics that old Detectron2 detectors have among their weights."""
    mean, std = (tensors.get(name) for name in ("pixel_mean", "pixel_std"))
    if mean is None or std is None or mean.numel() != 3 or std.numel() != 3:
        return {}
    mean, std = ([round(x, 4) for x in value.flatten().tolist()] for value in (mean, std))
    return {"format": "BGR" if mean[0] < mean[2] else "RGB", "mean": mean, "std": std}


def _find_zoo(author: str, tensors: Mapping[str, Tensor], source: str) -> Origin:
    known = author.lower()
    classes = _zoo_classes(tensors) if known == "detectron2 model zoo" else None
    pixels = _own_pixels(tensors)
    if known == "torchvision" or "/torchvision/" in source:
        return Origin("torchvision", "", pixels or IMAGENET_PIXELS, False, classes)
    if known not in _ZOO:
        return Origin(pixels=pixels)
    grouped = _grouped(tensors) or known == "pycls"
    pixels = pixels or (_SCALED if grouped else _UNSCALED)
    # MSRA's ResNets have strides in the 1x1 convolutions; those with GN or groups do not.
    in_1x1 = not grouped and "gn" not in re.split(r"[^a-z]", source.lower())
    return Origin(author, "", pixels, in_1x1, classes)


def find_origin(
    content: Mapping, tensors: Mapping[str, Tensor], rest: Mapping, matching: str, source: str
) -> Origin:
    """Finds the known facts about a file.

    Args:
        content: whole content of the file.
        tensors: weights by name.
        rest: other entries of the file.
        matching: as in :class:`contnet.checkpoint.reading.Weights`.
        source: path or URL of the file.
    """
    author = content.get("__author__")
    if author is None:
        author = "Caffe2" if matching == "caffe2" else "pycls" if "model_state" in content else ""
    if author:
        return _find_zoo(str(author), tensors, source)
    if not (who := detector_of(tensors.keys())):
        return Origin(pixels=_own_pixels(tensors))
    classes = detector_classes(tensors, who, rest)
    if who == "torchvision":
        return Origin("torchvision", who, IMAGENET_PIXELS, False, classes)
    meta = rest.get("meta")
    configs = [str(meta.get(key)) for key in ("config", "cfg")] if isinstance(meta, Mapping) else []
    if any(map(_CAFFE_STYLE.search, configs)):
        return Origin("MMDetection", who, _UNSCALED, True, classes)
    return Origin("MMDetection", who, {}, None, classes)
