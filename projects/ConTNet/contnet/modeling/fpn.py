"""Feature pyramids over bottom-up networks; importing this registers them.

There is one for every pair of a bottom-up network and a top block, with conventional names:
`build_contnet_fpn_backbone`, `build_retinanet_contnet_fpn_backbone` and so on. Use
:func:`register_bottom_up` or :func:`register_top_block` to add a network or a top block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from contnet.modeling.backbone import build_contnet_backbone

__all__ = [
    "BOTTOM_UPS",
    "TOP_BLOCKS",
    "BottomUp",
    "DivisibleFPN",
    "TopBlockMaker",
    "bottom_up_name",
    "register_bottom_up",
    "register_top_block",
    "requires_res5",
]

# Function that makes a top block from the shapes of the pyramid's inputs and the pyramid's width.
TopBlockMaker = Callable[[Mapping[str, ShapeSpec], int], nn.Module]


class BottomUp(NamedTuple):
    """A network on which pyramids are built.

    Attributes:
        build: its builder, as in Detectron2's registry of backbones.
        out_features_key: the config key that lists its features; "" if they are res2 to res5.
    """

    build: Callable[[CfgNode, ShapeSpec], Backbone]
    out_features_key: str = ""


class DivisibleFPN(FPN):
    """Detectron2's FPN, which also pads images to the bottom-up network's size divisibility."""

    @property
    def size_divisibility(self) -> int:
        """Least common multiple of the pyramid's and the bottom-up network's size divisibility."""
        return math.lcm(super().size_divisibility, self.bottom_up.size_divisibility or 1)


# Keys are parts of the builders' names: "resnet" of build_resnet_fpn_backbone, and the prefix
# "retinanet_" of build_retinanet_resnet_fpn_backbone.
BOTTOM_UPS: dict[str, BottomUp] = {}
TOP_BLOCKS: dict[str, TopBlockMaker] = {}
# Builders of networks without a pyramid, and the names of these networks.
_BARE_BUILDERS = {
    "build_contnet_backbone": "contnet",
    "build_resnet_backbone": "resnet",
    "build_dilated_resnet_backbone": "resnet",
}


def _make_builder(name: str, build_bottom_up: Callable, make_top_block: TopBlockMaker) -> Callable:
    def build(cfg: CfgNode, input_shape: ShapeSpec) -> DivisibleFPN:
        bottom_up = build_bottom_up(cfg, input_shape)
        shapes = bottom_up.output_shape()
        in_features = cfg.MODEL.FPN.IN_FEATURES
        width = cfg.MODEL.FPN.OUT_CHANNELS
        used = {feature: shapes[feature] for feature in in_features if feature in shapes}
        wanted = (*in_features, "res5") if requires_res5(name) else in_features
        if missing := [feature for feature in wanted if feature not in used]:
            raise ValueError(
                f"{name} needs the feature {missing[0]!r}, MODEL.FPN.IN_FEATURES and the bottom-up "
                f"network give {', '.join(used)}"
            )
        return DivisibleFPN(
            bottom_up=bottom_up,
            in_features=in_features,
            out_channels=width,
            norm=cfg.MODEL.FPN.NORM,
            top_block=make_top_block(used, width),
            fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
            square_pad=bottom_up.padding_constraints.get("square_size", 0),
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = "Builds a feature pyramid from ``cfg.MODEL.FPN`` and its bottom-up network."
    return build


def _register_pyramids() -> None:
    """Registers a builder for each pair that Detectron2 does not have."""
    for prefix, make_top_block in TOP_BLOCKS.items():
        for name, bottom_up in BOTTOM_UPS.items():
            builder = f"build_{prefix}{name}_fpn_backbone"
            if builder not in BACKBONE_REGISTRY:
                BACKBONE_REGISTRY.register(_make_builder(builder, bottom_up.build, make_top_block))


def requires_res5(builder: str) -> bool:
    """Whether a pyramid must end at res5, by its builder's name.

    Only those that this module builds with a max-pooled last level may end before it; Detectron2's
    own pyramid of ResNets takes that level from p5.
    """
    pooled = [f"build_{name}_fpn_backbone" for name in BOTTOM_UPS]
    return builder not in pooled or BACKBONE_REGISTRY.get(builder).__module__ != __name__


def bottom_up_name(builder: str) -> str:
    """Returns the registered name of a builder's bottom-up network, such as "contnet".

    Args:
        builder: MODEL.BACKBONE.NAME of a pyramid or of the bare network.

    Returns:
        The network's name, or ``builder`` itself if it belongs to no registered network.
    """
    names = {f"build_{p}{name}_fpn_backbone": name for p in TOP_BLOCKS for name in BOTTOM_UPS}
    return {**names, **_BARE_BUILDERS}.get(builder, builder)


def register_bottom_up(name: str, bottom_up: BottomUp) -> None:
    """Registers a pyramid over a network for each top block.

    Args:
        name: as in ``build_NAME_fpn_backbone``.
        bottom_up: the network; pyramids with other top blocks than max pooling need its ``res5``.
    """
    BOTTOM_UPS[name] = bottom_up
    _register_pyramids()


def register_top_block(prefix: str, make_top_block: TopBlockMaker) -> None:
    """Registers a pyramid with a top block over each network.

    Args:
        prefix: as in ``build_PREFIXcontnet_fpn_backbone``, with an underscore at its end.
        make_top_block: creates it from the shapes of the pyramid's inputs, of which the last is
            ``res5``, and the pyramid's width.
    """
    TOP_BLOCKS[prefix] = make_top_block
    _register_pyramids()


def _pool_last_level(shapes: Mapping[str, ShapeSpec], width: int) -> LastLevelMaxPool:
    block = LastLevelMaxPool()
    # Detectron2 always takes p5, even if the pyramid ends before it.
    stride = max(shape.stride for shape in shapes.values())
    block.in_feature = f"p{int(math.log2(stride))}"
    return block


register_bottom_up("contnet", BottomUp(build_contnet_backbone, "MODEL.CONTNET.OUT_FEATURES"))
register_bottom_up("resnet", BottomUp(build_resnet_backbone, "MODEL.RESNETS.OUT_FEATURES"))
register_top_block("", _pool_last_level)
register_top_block(
    "retinanet_", lambda shapes, width: LastLevelP6P7(shapes["res5"].channels, width, "res5")
)
register_top_block("fcos_", lambda shapes, width: LastLevelP6P7(width, width, "p5"))
