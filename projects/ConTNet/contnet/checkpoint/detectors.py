"""Converts detectors of torchvision and MMDetection to Detectron2's names and layouts.

Their backbones are ResNets with torchvision's names, which ``key_mapping`` converts; this module
converts the pyramids and heads. Parts that would compute something else in Detectron2 are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

__all__ = ["detector_classes", "detector_of", "translate_detector"]

# Patterns of tensor names that identify the library of a detector.
_MARKS = {
    "torchvision": re.compile(r"backbone\.body\..+|backbone\.fpn\.inner_blocks\..+"),
    "mmdetection": re.compile(r"(neck\.lateral_convs|roi_head\.bbox_head|rpn_head\.rpn_conv)\..+"),
}
_RATIOS = 3  # aspect ratios of anchors: 1:2, 1:1 and 2:1
_NO_CLASS = "N/A"
_BOX, _MASK, _RPN = "roi_heads.box_predictor.", "roi_heads.mask_head.", "proposal_generator."

# Patterns of a library's names, with Detectron2's names. Numbers in braces (pyramid levels, layers
# of sub-networks) count as in the library, and _number() converts them to Detectron2's.
_TORCHVISION = (
    (r"backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?", r"backbone.fpn_lateral{\1}"),
    (r"backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?", r"backbone.fpn_output{\1}"),
    (r"backbone\.fpn\.extra_blocks\.(p[67])", r"backbone.top_block.\1"),
    (r"rpn\.head\.conv(?:\.0\.0)?", _RPN + "rpn_head.conv"),
    (r"rpn\.head\.cls_logits", _RPN + "rpn_head.objectness_logits"),
    (r"rpn\.head\.bbox_pred", _RPN + "rpn_head.anchor_deltas"),
    (r"roi_heads\.box_head\.fc6", "roi_heads.box_head.fc1"),
    (r"roi_heads\.box_head\.fc7", "roi_heads.box_head.fc2"),
    (r"roi_heads\.box_predictor\.(cls_score|bbox_pred)", _BOX + r"\1"),
    (r"roi_heads\.mask_head\.(\d)\.0", _MASK + r"mask_fcn{+\1}"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)", _MASK + r"mask_fcn\1"),
    (r"roi_heads\.mask_predictor\.conv5_mask", _MASK + "deconv"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits", _MASK + "predictor"),
    (r"head\.classification_head\.cls_logits", "head.cls_score"),
    (r"head\.regression_head\.bbox_reg", "head.bbox_pred"),
    (r"head\.classification_head\.conv\.(\d+)\.0", r"head.cls_subnet.{n*\1}"),
    (r"head\.regression_head\.conv\.(\d+)\.0", r"head.bbox_subnet.{n*\1}"),
    (r"head\.classification_head\.conv\.(\d+)\.1", r"head.cls_subnet.{n*\1+1}"),
    (r"head\.regression_head\.conv\.(\d+)\.1", r"head.bbox_subnet.{n*\1+1}"),
    (r"head\.classification_head\.conv\.(\d+)", r"head.cls_subnet.\1"),
    (r"head\.regression_head\.conv\.(\d+)", r"head.bbox_subnet.\1"),
)
_MMDETECTION = (
    (r"neck\.lateral_convs\.(\d)\.conv", r"backbone.fpn_lateral{\1}"),
    (r"neck\.fpn_convs\.(\d)\.conv", r"backbone.fpn_output{\1}"),
    (r"rpn_head\.rpn_conv", _RPN + "rpn_head.conv"),
    (r"rpn_head\.rpn_cls", _RPN + "rpn_head.objectness_logits"),
    (r"rpn_head\.rpn_reg", _RPN + "rpn_head.anchor_deltas"),
    (r"roi_head\.bbox_head\.(\d\.)?shared_fcs\.(\d)", r"roi_heads.box_head.\1fc{+\2}"),
    (r"roi_head\.bbox_head\.(\d\.)?fc_cls", _BOX + r"\1cls_score"),
    (r"roi_head\.bbox_head\.(\d\.)?fc_reg", _BOX + r"\1bbox_pred"),
    (r"roi_head\.mask_head\.convs\.(\d)\.conv", _MASK + r"mask_fcn{+\1}"),
    (r"roi_head\.mask_head\.upsample", _MASK + "deconv"),
    (r"roi_head\.mask_head\.conv_logits", _MASK + "predictor"),
    (r"bbox_head\.(?:retina_cls|conv_cls)", "head.cls_score"),
    (r"bbox_head\.(?:retina_reg|conv_reg)", "head.bbox_pred"),
    (r"bbox_head\.conv_centerness", "head.ctrness"),
    (r"bbox_head\.cls_convs\.(\d)\.conv", r"head.cls_subnet.{n*\1}"),
    (r"bbox_head\.reg_convs\.(\d)\.conv", r"head.bbox_subnet.{n*\1}"),
    (r"bbox_head\.cls_convs\.(\d)\.gn", r"head.cls_subnet.{n*\1+1}"),
    (r"bbox_head\.reg_convs\.(\d)\.gn", r"head.bbox_subnet.{n*\1+1}"),
)
_TABLES = {
    who: [(re.compile(rf"{theirs}\.(weight|bias)"), ours) for theirs, ours in table]
    for who, table in (("torchvision", _TORCHVISION), ("mmdetection", _MMDETECTION))
}


def detector_of(names: Collection[str]) -> str:
    """Returns the library of a detector, by tensor names: "torchvision", "mmdetection" or ""."""
    for who, mark in _MARKS.items():
        if any(mark.fullmatch(name) for name in names):
            return who
    return ""


def _number(name: str, names: Collection[str]) -> str:
    """Converts the numbers in braces in a name to Detectron2's numbers."""
    laterals = {m[0] for k in names if (m := re.search(r"(inner_blocks|lateral_convs)\.\d", k))}
    normed = any(re.search(r"\.gn\.|_head\.conv\.\d+\.1\.", other) for other in names)

    def level(match: re.Match) -> str:
        found = int(match[2]) + 6 - len(laterals)
        # MMDetection's extra convolutions follow those of the backbone's features.
        return f"top_block.p{found}" if found > 5 else f"{match[1]}{found}"

    name = re.sub(r"(fpn_lateral|fpn_output)\{(\d)\}", level, name)
    name = re.sub(r"\{\+(\d)\}", lambda match: str(int(match[1]) + 1), name)
    step = 3 if normed else 2  # convolution, norm and activation
    return re.sub(
        r"\{n\*(\d+)(\+1)?\}", lambda match: str(step * int(match[1]) + bool(match[2])), name
    )


def _rename(name: str, who: str, names: Collection[str]) -> str:
    for theirs, ours in _TABLES[who]:
        if match := theirs.fullmatch(name):
            return _number(match.expand(ours), names) + "." + match[match.lastindex]
    return ""


# --- values --------------------------------------------------------------------------------------


def _swap_anchors(value: Tensor) -> Tensor:
    """Reorders anchors from sizes, then ratios, to ratios, then sizes."""
    rows = value.unflatten(0, (_RATIOS, -1))
    return rows.transpose(0, 1).flatten(0, 1)


def _of_places(value: Tensor, width: int) -> Tensor:
    """Reorders the rows of a dense head with several anchors to Detectron2's order."""
    return _swap_anchors(value.unflatten(0, (-1, width))).flatten(0, 1)


def _kept_classes(rows: int) -> list[int]:
    """Returns the rows of torchvision's classes, without background (row 0) and "N/A"."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [i for i in range(1, rows) if rows != len(names) or names[i] != _NO_CLASS]


def _torchvision_values(tensors: Mapping[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns conversions of values, by Detectron2's names without ``.weight`` and ``.bias``."""

    def scores(value: Tensor) -> Tensor:
        return value[[*_kept_classes(len(value)), 0]]

    def boxes(value: Tensor) -> Tensor:
        rows = value.unflatten(0, (-1, 4))
        return rows[_kept_classes(len(rows))].flatten(0, 1)

    changes = {
        f"{_BOX}cls_score": scores,
        f"{_BOX}bbox_pred": boxes,
        f"{_MASK}predictor": lambda value: value[_kept_classes(len(value))],
    }
    anchors = len(tensors.get("head.bbox_pred.bias", torch.zeros(4))) // 4
    if anchors == 1:  # FCOS
        return {**changes, "head.cls_score": lambda value: value[_kept_classes(len(value))]}

    def dense(value: Tensor) -> Tensor:
        rows = value.unflatten(0, (anchors, -1))
        rows = rows[:, _kept_classes(rows.shape[1])]
        return _swap_anchors(rows).flatten(0, 1)

    return {
        **changes,
        "head.cls_score": dense,
        "head.bbox_pred": lambda value: _of_places(value, 4),
    }


def _mmdetection_values(tensors: Mapping[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    anchors = len(tensors.get("head.bbox_pred.bias", torch.zeros(4))) // 4
    if anchors == 1:
        return {}
    return {
        "head.cls_score": lambda value: _of_places(value, len(value) // anchors),
        "head.bbox_pred": lambda value: _of_places(value, 4),
    }


_VALUES = {"torchvision": _torchvision_values, "mmdetection": _mmdetection_values}


def _unlike(who: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns prefixes of Detectron2's names whose tensors mean something else there."""
    dense = "head.bbox_pred.bias" in tensors
    fcos = dense and len(tensors["head.bbox_pred.bias"]) == 4
    if fcos and who == "torchvision":
        # torchvision's locations differ from Detectron2's by half a stride.
        return ["head.bbox_pred."]
    if dense and not fcos and len(tensors["head.bbox_pred.bias"]) % (4 * _RATIOS):
        return ["head.cls_score.", "head.bbox_pred."]
    if dense and not fcos and who == "mmdetection":
        # MMDetection computes p7 from p6, but Detectron2 from relu(p6).
        return ["backbone.top_block.p7."]
    first = tensors.get(f"{_RPN}rpn_head.objectness_logits.bias")
    if first is not None and len(first) != _RATIOS:
        return [f"{_RPN}rpn_head.objectness_logits.", f"{_RPN}rpn_head.anchor_deltas."]
    return []


def translate_detector(
    tensors: Mapping[str, Tensor], who: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Converts the pyramid and the heads, not the backbone.

    Args:
        tensors: tensors of the file, by its names.
        who: the library, from :func:`detector_of`.

    Returns:
        Tensors by Detectron2's names, and the file's names of tensors without a counterpart.
    """
    names = {name: _rename(name, who, tensors) for name in tensors}
    found = {ours: tensors[name] for name, ours in names.items() if ours}
    unlike = tuple(_unlike(who, found))
    left = [k for k, ours in names.items() if not ours or (unlike and ours.startswith(unlike))]
    # MMDetection's FCOS has a scale of distances for each pyramid level.
    scales = [k for k in tensors if re.fullmatch(r"bbox_head\.scales\.\d\.scale", k)]
    made = {}
    changes = _VALUES[who](found)
    for name, value in found.items():
        if not (unlike and name.startswith(unlike)):
            change = changes.get(name.rpartition(".")[0], lambda value: value)
            made[name] = change(value)
    if scales:
        made["head.scales"] = torch.stack([tensors[k].reshape(()) for k in sorted(scales)])
        left = [name for name in left if name not in scales]
    return made, left


def detector_classes(tensors: Mapping[str, Tensor], who: str, rest: Mapping) -> list[str] | None:
    """Returns the classes of a detector, without background; None if they are unknown."""
    if who == "torchvision":
        names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
        rows = len(tensors.get("roi_heads.box_predictor.cls_score.bias", ()))
        if "head.regression_head.bbox_reg.bias" in tensors:
            anchors = len(tensors["head.regression_head.bbox_reg.bias"]) // 4
            rows = len(tensors.get("head.classification_head.cls_logits.bias", ())) // anchors
        return [names[i] for i in _kept_classes(rows)] if rows == len(names) else None
    meta = rest.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    facts = meta.get("dataset_meta")
    facts = {**meta, **(facts if isinstance(facts, Mapping) else {})}
    classes = facts.get("classes", facts.get("CLASSES"))
    return (
        [str(name) for name in classes] if classes and isinstance(classes, list | tuple) else None
    )
