"""Runs weights in each format, to compare a conversion's source with its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import timm
from torch import Tensor
from torch.nn import functional as F

from contnet.checkpoint.reference_network import ReferenceNetwork
from contnet.modeling.contnet import create_model

__all__ = ["RUNNERS"]

State = Mapping[str, Tensor]


def _run_authors(variant: str, options: dict, state: State, images: Tensor):
    model = ReferenceNetwork(variant, **options).eval()
    # Buffers that a file may lack, because the network computes them or does not use them.
    left_out = (".relative_position_index", ".num_batches_tracked")
    own = {name: value for name, value in model.state_dict().items() if name.endswith(left_out)}
    model.load_state_dict({**own, **state})
    features = model.last_map(images)
    return features, model.fc(features.mean((2, 3)))


def _run_contnet(variant: str, options: dict, state: State, images: Tensor):
    model = create_model(variant, **options).eval()
    model.load_state_dict(state)
    features = model.forward_features(images)
    return features, model.forward_head(features)


def _run_timm(variant: str, options: dict, state: State, images: Tensor):
    model = timm.create_model(variant, **options).eval()
    model.load_state_dict(state)
    features = model.forward_features(images)
    return features, model.forward_head(features)


def _run_detectron2(variant: str, options: dict, state: State, images: Tensor):
    # Imported here, because only this format needs Detectron2.
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_resnet_backbone

    cfg = get_cfg()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = depth = int(variant.removeprefix("resnet"))
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    model = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    head = {k: v.float() for k, v in state.items() if k.startswith("linear.")}
    # The model's norms are frozen, and do not count batches.
    counts = ".num_batches_tracked"
    model.load_state_dict({k: v for k, v in state.items() if k not in head and counts not in k})
    features = model(images)["res5"]
    mean = features.mean((2, 3))
    return features, F.linear(mean, head["linear.weight"], head["linear.bias"]) if head else mean


# By format: a function of (variant, options, state dict, images) that returns last map and logits.
RUNNERS: dict[str, Callable[[str, dict, State, Tensor], tuple[Tensor, Tensor]]] = {
    "authors": _run_authors,
    "contnet": _run_contnet,
    "timm": _run_timm,
    "detectron2": _run_detectron2,
}
