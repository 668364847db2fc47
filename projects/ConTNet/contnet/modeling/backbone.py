"""ConTNet as a Detectron2 backbone, and a dilated ResNet; importing this registers them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ResNet, build_resnet_backbone
from torch import Tensor, nn

from contnet.modeling.classifier import ImageClassifier, contnet_options
from contnet.modeling.contnet import FEATURES, VARIANTS, ConTNet

__all__ = [
    "NORMS",
    "ConTNetBackbone",
    "backbone_prefix",
    "build_contnet_backbone",
    "build_dilated_resnet_backbone",
]

NORMS = ("BN", "FrozenBN", "SyncBN", "naiveSyncBN", "GN")


def _make_norm(name: str, channels: int) -> nn.Module:
    if name not in NORMS:
        raise ValueError(f"norm is {name!r}, it must be one of {', '.join(NORMS)}")
    if name == "GN":
        return nn.GroupNorm(math.gcd(32, channels), channels)
    return get_norm(name, channels)


class ConTNetBackbone(ConTNet, Backbone):
    """A ConTNet without classifier that returns named features.

    Args:
        norm: normalisation layer of the blocks, one of ``NORMS``.
        out_features: names from ``FEATURES``. Stages after the last one are not built.
        freeze_at: freeze the first layers: 0 none, 1 the stem, 2 the stem and stage 1, up to 5 all.
        **options: arguments of :class:`ConTNet`.
    """

    def __init__(
        self,
        *,
        norm: str = "BN",
        out_features: Sequence[str] = FEATURES,
        freeze_at: int = 0,
        **options,
    ):
        unknown = [name for name in out_features if name not in FEATURES]
        if unknown or not out_features:
            wrong = f"no feature {unknown[0]!r}" if unknown else "no features are asked for"
            raise ValueError(f"{wrong}, there are {', '.join(FEATURES)}")
        if freeze_at not in range(len(FEATURES) + 2):
            raise ValueError(f"freeze_at is {freeze_at!r}, it must be 0 to {len(FEATURES) + 1}")
        super().__init__(
            **options, num_classes=0, norm_layer=lambda channels: _make_norm(norm, channels)
        )
        self.out_features = tuple(name for name in FEATURES if name in out_features)
        self.prune_intermediate_layers([FEATURES.index(name) for name in self.out_features])
        if self.taps == "pre" and self.out_features[-1] != FEATURES[-1]:
            # Layers after this tap are not used, and DDP rejects parameters without a gradient.
            last = self.stages[-1][-1]
            last.conv.requires_grad_(False)
            last.shortcut.requires_grad_(False)
        self._freeze(freeze_at)

    def _freeze(self, freeze_at: int) -> None:
        for part in [self.stem, *self.stages][:freeze_at]:
            part.requires_grad_(False)
            FrozenBatchNorm2d.convert_frozen_batchnorm(part)

    @property
    def size_divisibility(self) -> int:
        """Always 0: any image size is accepted, because the network pads and masks its patches."""
        return 0

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Returns the channels and stride of each feature."""
        return {
            name: ShapeSpec(
                channels=self.out_feature_channels[name], stride=self.out_feature_strides[name]
            )
            for name in self.out_features
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Returns named features of images (N, C, H, W); a map of stride s has ceil(H / s) rows."""
        return self.forward_features(x, self.out_features)


def backbone_prefix(model: nn.Module) -> str:
    """Returns the prefix of the backbone's keys in a state dict, such as "backbone.bottom_up.".

    The backbone is a classifier's network, or the innermost backbone of a detector.

    Raises:
        ValueError: if the model has no backbone.
    """
    if isinstance(model, ImageClassifier):
        return "network."
    for name, module in model.named_modules():
        if isinstance(module, (Backbone, ConTNet)) and not any(
            isinstance(child, Backbone) for child in module.children()
        ):
            return f"{name}." if name else ""
    raise ValueError(f"{type(model).__name__} has no backbone")


@BACKBONE_REGISTRY.register()
def build_contnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ConTNetBackbone:
    """Builds the bare network from ``cfg.MODEL.CONTNET``."""
    node = cfg.MODEL.CONTNET
    if node.VARIANT not in VARIANTS:
        raise ValueError(f"no ConTNet is called {node.VARIANT!r}, there are {', '.join(VARIANTS)}")
    options = {
        **VARIANTS[node.VARIANT],
        "in_chans": input_shape.channels,
        **contnet_options(cfg),
        "taps": node.TAPS,
        "output_stride": node.OUTPUT_STRIDE,
        "dilated_patches": node.DILATED_PATCHES,
        "norm": node.NORM,
        "out_features": node.OUT_FEATURES,
        "freeze_at": node.FREEZE_AT,
    }
    backbone = ConTNetBackbone(**options)
    backbone.set_grad_checkpointing(node.GRAD_CHECKPOINTING)
    return backbone


def _dilate(block: nn.Module, dilation: int) -> int:
    """Replaces a ResNet block's stride by dilation; returns the dilation of the next blocks."""
    for name in ("conv1", "conv2", "conv3"):
        if (conv := getattr(block, name, None)) is None:
            continue
        stride = conv.stride[0]
        conv.stride = (1, 1)
        if conv.kernel_size != (1, 1):
            conv.dilation = conv.padding = (dilation, dilation)
        dilation *= stride
    if block.shortcut is not None:
        block.shortcut.stride = (1, 1)
    block.stride = 1
    return dilation


@BACKBONE_REGISTRY.register()
def build_dilated_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds Detectron2's ResNet with ``MODEL.RESNETS.OUTPUT_STRIDE``, by dilating the last stages.

    As in ConTNet, the same weights fit: at every (32 / output stride)-th pixel, res5 equals that of
    the network without dilation.
    """
    plain = build_resnet_backbone(cfg, input_shape)
    stages = [list(stage) for stage in plain.stages]
    stride, dilation = plain.stem.stride, 1
    for block in [block for stage in stages for block in stage]:
        if stride * block.stride > cfg.MODEL.RESNETS.OUTPUT_STRIDE or dilation > 1:
            dilation = _dilate(block, dilation)
        else:
            stride *= block.stride
    return ResNet(
        plain.stem,
        stages,
        out_features=cfg.MODEL.RESNETS.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
