"""FCOS as a registered meta-architecture, in both published versions.

Sources: plain, Tian et al., 2019, arXiv 1904.01355 (no centre sampling, IoU loss, distances as
exp of a learned scale per level, centre-ness beside the classes); improved, Tian et al., 2020,
arXiv 2006.09214 (centre sampling, GIoU loss, distances in strides, centre-ness beside the boxes).
The improved version is Detectron2's own FCOS, which has no config keys. This module adds the keys,
the plain version, and losses that are normalised over all processes.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils import comm
from torch import Tensor, nn

__all__ = ["BOX_LOSSES", "CENTERNESS_BRANCHES", "FCOS", "FCOSHead"]

BOX_LOSSES = ("giou", "iou")
CENTERNESS_BRANCHES = ("regression", "classification")

_LEAST_IOU = 1e-6


def _mean_over_processes(value: Tensor) -> Tensor:
    """Returns the mean of a number over all processes, because gradients are averaged, too.

    Args:
        value: scalar on the model's device.

    Returns:
        Scalar in float64, on the same device.
    """
    total = value.to(torch.float64, copy=True)
    if comm.get_world_size() == 1 or not torch.is_grad_enabled():
        return total  # without gradients, each process normalises over its own images
    dist.all_reduce(total)
    return total / comm.get_world_size()


class FCOSHead(fcos.FCOSHead):
    """Detectron2's head with the options of the plain version.

    Args:
        input_shape: shape of each level.
        centerness_on: the branch that predicts centre-ness, one of ``CENTERNESS_BRANCHES``.
        normalize_box: predict distances in strides; if False, in pixels, as exp of the
            prediction times a learned scale per level.
        **kwargs: arguments of Detectron2's head.
    """

    def __init__(
        self, *, input_shape: list[ShapeSpec], centerness_on: str, normalize_box: bool, **kwargs
    ):
        super().__init__(input_shape=input_shape, **kwargs)
        self.centerness_on = centerness_on
        self.scales = None if normalize_box else nn.Parameter(torch.ones(len(input_shape)))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Predicts on every level.

        Args:
            features: maps (N, C, Hi, Wi), one for each level.

        Returns:
            Lists over levels of class logits (N, num_classes, Hi, Wi), distances to the four
            sides (N, 4, Hi, Wi) and centre-ness logits (N, 1, Hi, Wi).
        """
        logits, distances, centerness = [], [], []
        for level, feature in enumerate(features):
            towers = {
                "classification": self.cls_subnet(feature),
                "regression": self.bbox_subnet(feature),
            }
            logits.append(self.cls_score(towers["classification"]))
            centerness.append(self.ctrness(towers[self.centerness_on]))
            # Half precision is too coarse for distances; Detectron2's losses mix it with float32.
            distance = self.bbox_pred(towers["regression"]).float()
            if self.scales is not None:
                distance = (distance * self.scales[level]).exp()
            distances.append(distance)
        return logits, distances, centerness


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """Detectron2's FCOS, built from ``cfg.MODEL.FCOS``.

    Args:
        box_loss: one of ``BOX_LOSSES``; "iou" is -log(IoU), weighted by centre-ness.
        **kwargs: arguments of Detectron2's FCOS.
    """

    @configurable
    def __init__(self, *, box_loss: str, **kwargs):
        super().__init__(**kwargs)
        self.box_loss = box_loss

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        width = cfg.MODEL.FPN.OUT_CHANNELS
        head = FCOSHead(
            input_shape=[shapes[name] for name in node.IN_FEATURES],
            num_classes=node.NUM_CLASSES,
            conv_dims=[width] * node.NUM_CONVS,
            norm=node.NORM,
            prior_prob=node.PRIOR_PROB,
            centerness_on=node.CENTERNESS_ON,
            normalize_box=node.NORMALIZE_BOX,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": node.IN_FEATURES,
            "box2box_transform": Box2BoxTransformLinear(normalize_by_size=node.NORMALIZE_BOX),
            "num_classes": node.NUM_CLASSES,
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS or math.inf,
            "box_loss": node.BOX_LOSS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def _ema_update(
        self, name: str, value: float, initial_value: float, momentum: float = 0.9
    ) -> float:
        """Updates Detectron2's running normaliser with the mean over all processes."""
        if comm.get_world_size() > 1:
            number = torch.full((), value, dtype=torch.float64, device=self.device)
            value = _mean_over_processes(number).item()
        return super()._ema_update(name, value, initial_value, momentum)

    def losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
    ) -> dict[str, Tensor]:
        """Returns Detectron2's losses; ``box_loss`` "iou" replaces the box loss."""
        losses = super().losses(
            anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
        )
        if self.box_loss == "iou":
            losses["loss_fcos_loc"] = self._iou_loss(
                anchors, gt_labels, pred_anchor_deltas, gt_boxes
            )
        return losses

    def _iou_loss(
        self,
        anchors: list[Boxes],
        gt_labels: list[Tensor],
        pred_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> Tensor:
        """Returns the mean -log(IoU) of all processes' positive locations, weighted by centre-ness.

        Args:
            anchors: anchors of each level.
            gt_labels: per image (R,), ``num_classes`` for background.
            pred_deltas: per level (N, Hi * Wi, 4).
            gt_boxes: per image (R, 4), in pixels.
        """
        labels = torch.stack(gt_labels)
        image, location = torch.nonzero((labels >= 0) & (labels != self.num_classes), as_tuple=True)
        weights = self.compute_ctrness_targets(anchors, gt_boxes)[image, location]
        deltas = torch.cat(pred_deltas, dim=1)[image, location]
        boxes = self.box2box_transform.apply_deltas(deltas, Boxes.cat(anchors).tensor[location])
        truth = Boxes(torch.stack(gt_boxes)[image, location])
        iou = matched_pairwise_iou(Boxes(boxes), truth).clamp(min=_LEAST_IOU)
        total = _mean_over_processes(weights.sum()).clamp(min=_LEAST_IOU)
        return -(weights * iou.log()).sum() / total.to(weights.dtype)
