"""PSPNet's head, and a semantic segmentor with sliding-window inference.

Source: Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, arXiv 1612.01105.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY, SemanticSegmentor
from detectron2.modeling.postprocessing import sem_seg_postprocess
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SEGMENTORS", "PSPHead", "WindowSegmentor", "window_starts"]

# Meta-architectures whose only output is a semantic map.
SEGMENTORS = ("SemanticSegmentor", "WindowSegmentor")


def _conv(channels: int, width: int, kernel_size: int, norm: str) -> Conv2d:
    return Conv2d(
        channels,
        width,
        kernel_size,
        padding=kernel_size // 2,
        bias=not norm,
        norm=get_norm(norm, width),
        activation=F.relu,
    )


def _enlarge(x: Tensor, **size) -> Tensor:
    return F.interpolate(x, mode="bilinear", align_corners=False, **size)


@SEM_SEG_HEADS_REGISTRY.register()
class PSPHead(nn.Module):
    """Pyramid pooling on the last feature, and an auxiliary classifier on the previous one.

    Args:
        input_shape: channels and strides by feature.
        in_features: the auxiliary classifier's feature and the main one.
        num_classes: number of classes.
        width: channels of the main classifier's 3x3 convolution.
        bins: side lengths of the pooled maps; each map has the feature's channels divided by the
            number of bins.
        norm: normalisation layer of all convolutions but the last, as Detectron2 names it.
        dropout: dropout of whole channels before each classifier, in [0, 1).
        ignore_value: label that is ignored by the losses.
        loss_weight: weight of the main loss.
        aux_width: channels of the auxiliary classifier's 3x3 convolution.
        aux_loss_weight: weight of the auxiliary loss; 0 for no auxiliary classifier.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        num_classes: int,
        width: int,
        bins: Sequence[int],
        norm: str,
        dropout: float,
        ignore_value: int,
        loss_weight: float,
        aux_width: int,
        aux_loss_weight: float,
    ):
        super().__init__()
        self.aux_feature, self.feature = in_features
        self.stride = input_shape[self.feature].stride
        self.aux_stride = input_shape[self.aux_feature].stride
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        self.aux_loss_weight = aux_loss_weight
        channels = input_shape[self.feature].channels
        branch = channels // len(bins)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), _conv(channels, branch, 1, norm))
            for side in bins
        )
        self.classifier = nn.Sequential(
            _conv(channels + branch * len(bins), width, 3, norm),
            nn.Dropout2d(dropout),
            Conv2d(width, num_classes, 1),
        )
        self.aux_classifier = None
        if aux_loss_weight > 0:
            self.aux_classifier = nn.Sequential(
                _conv(input_shape[self.aux_feature].channels, aux_width, 3, norm),
                nn.Dropout2d(dropout),
                Conv2d(aux_width, num_classes, 1),
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        node, psp = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.PSP_HEAD
        return {
            "input_shape": input_shape,
            "in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "width": node.CONVS_DIM,
            "bins": psp.BINS,
            "norm": node.NORM,
            "dropout": psp.DROPOUT,
            "ignore_value": node.IGNORE_VALUE,
            "loss_weight": node.LOSS_WEIGHT,
            "aux_width": psp.AUX_CONVS_DIM,
            "aux_loss_weight": psp.AUX_LOSS_WEIGHT,
        }

    def _predict(self, feature: Tensor) -> Tensor:
        size = feature.shape[-2:]
        pooled = [_enlarge(branch(feature), size=size) for branch in self.branches]
        return self.classifier(torch.cat([feature, *pooled], dim=1))

    def _loss(self, logits: Tensor, stride: int, targets: Tensor) -> Tensor:
        logits = _enlarge(logits.float(), scale_factor=stride)
        logits = logits[..., : targets.shape[-2], : targets.shape[-1]]
        # The mean of cross_entropy is NaN if no pixel has a label.
        valid = (targets != self.ignore_value).sum().clamp(min=1)
        total = F.cross_entropy(logits, targets, ignore_index=self.ignore_value, reduction="sum")
        return total / valid

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Classifies each pixel.

        Args:
            features: maps (N, C, Hi, Wi) by name.
            targets: in training, labels (N, H, W).

        Returns:
            In training None and the losses; otherwise logits (N, num_classes, Hi * stride, Wi *
            stride) and no losses.
        """
        logits = self._predict(features[self.feature])
        if not self.training:
            return _enlarge(logits.float(), scale_factor=self.stride), {}
        losses = {"loss_sem_seg": self._loss(logits, self.stride, targets) * self.loss_weight}
        if self.aux_classifier is not None:
            auxiliary = self.aux_classifier(features[self.aux_feature])
            losses["loss_sem_seg_aux"] = self.aux_loss_weight * self._loss(
                auxiliary, self.aux_stride, targets
            )
        return None, losses


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Returns the starts of windows that cover ``size`` pixels; the last one ends at the border."""
    last = max(size - window, 0)
    return [*range(0, last, stride), last]


@META_ARCH_REGISTRY.register()
class WindowSegmentor(SemanticSegmentor):
    """Detectron2's segmentor, with optional sliding-window inference.

    The logits of overlapping windows are averaged.

    Args:
        num_classes: number of classes of the head.
        window: height and width in pixels of the network's input; None for the whole image.
        window_stride: vertical and horizontal stride of the windows, in pixels.
        **kwargs: arguments of Detectron2's segmentor.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        window: tuple[int, int] | None,
        window_stride: tuple[int, int],
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.window = window
        self.window_stride = window_stride

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.TEST.SLIDING_WINDOW
        return {
            **super().from_config(cfg),
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "window": tuple(node.SIZE) if node.ENABLED else None,
            "window_stride": tuple(node.STRIDE),
        }

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Returns losses in training, otherwise ``sem_seg`` logits (K, H, W) for each image."""
        if self.training or self.window is None:
            return super().forward(batched_inputs)
        return [{"sem_seg": self._slide(inputs)} for inputs in batched_inputs]

    def _slide(self, inputs: dict) -> Tensor:
        image = inputs["image"]
        size = tuple(image.shape[-2:])
        total = torch.zeros(self.num_classes, *size, device=self.device)
        count = torch.zeros(size, device=self.device)
        for top in window_starts(size[0], self.window[0], self.window_stride[0]):
            for left in window_starts(size[1], self.window[1], self.window_stride[1]):
                rows = slice(top, top + self.window[0])
                columns = slice(left, left + self.window[1])
                (output,) = super().forward([{"image": image[:, rows, columns]}])
                total[:, rows, columns] += output["sem_seg"]
                count[rows, columns] += 1
        height, width = inputs.get("height", size[0]), inputs.get("width", size[1])
        return sem_seg_postprocess(total / count, size, height, width)
