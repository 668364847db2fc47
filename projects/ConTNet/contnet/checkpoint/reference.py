"""Runs weights in each of their forms, to compare a conversion's source with its result.

The authors' form is run straight from their tensors, by their names, patch after patch: plain, slow
and without a line of :mod:`contnet.modeling` or of the conversion, so that it can prove both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from contnet.modeling.contnet import create_model

__all__ = ["RUNNERS", "run_authors"]

# Heads are the one thing that neither names nor shapes show.
_HEADS = {1: 1, 2: 2, 3: 4, 4: 8}

State = Mapping[str, Tensor]


def _offsets(patch_size: int) -> Tensor:
    """Row of the relative table for each pair of tokens (P*P, P*P)."""
    row, column = torch.meshgrid(*[torch.arange(patch_size)] * 2, indexing="ij")
    row, column = row.flatten(), column.flatten()
    width = 2 * patch_size - 1
    down = row[:, None] - row + patch_size - 1
    return down * width + column[:, None] - column + patch_size - 1


def _attend(state: State, name: str, x: Tensor, heads: int, bias: Tensor | float) -> Tensor:
    qkv = F.linear(x, state[f"{name}.qkv.weight"], state.get(f"{name}.qkv.bias"))
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, 2))
    weights = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return F.linear(out, state[f"{name}.proj.weight"], state[f"{name}.proj.bias"])


def _transform(
    state: State, name: str, x: Tensor, heads: int, bias: Tensor | float, pre_norm: bool
) -> Tensor:
    """One transformer layer on the tokens (N, T, C) of a patch."""

    def norm(which: str, x: Tensor) -> Tensor:
        weight, bias = state[f"{name}.{which}.weight"], state[f"{name}.{which}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    def mlp(x: Tensor) -> Tensor:
        x = F.linear(x, state[f"{name}.mlp.fc1.weight"], state[f"{name}.mlp.fc1.bias"])
        return F.linear(F.gelu(x), state[f"{name}.mlp.fc2.weight"], state[f"{name}.mlp.fc2.bias"])

    if pre_norm:
        x = x + _attend(state, f"{name}.attn", norm("norm1", x), heads, bias)
        return x + mlp(norm("norm2", x))
    x = norm("norm1", x + _attend(state, f"{name}.attn", x, heads, bias))
    return norm("norm2", x + mlp(x))


def _encode(state: State, name: str, x: Tensor, heads: int, pre_norm: bool) -> Tensor:
    """An encoder on a map (N, C, H, W); patches that hang over the margin are cut short."""
    table = state.get(f"{name}.attn.relative_position_bias_table")
    if table is None:
        size = state[f"{name}.pe.0"].shape[1]
    else:
        size = (math.isqrt(len(table)) + 1) // 2
        index = state.get(f"{name}.attn.relative_position_index", _offsets(size))
    grid = torch.arange(size**2).view(size, size)

    def encode_patch(patch: Tensor) -> Tensor:
        height, width = patch.shape[2:]
        bias = 0.0
        if table is None:
            rows = state[f"{name}.pe.0"][:, :height].expand(-1, -1, width, -1)
            columns = state[f"{name}.pe.1"][:, :, :width].expand(-1, height, -1, -1)
            patch = patch + torch.cat([rows, columns], 3).permute(0, 3, 1, 2)
        else:
            tokens = grid[:height, :width].flatten()
            bias = table[index[tokens][:, tokens]].permute(2, 0, 1)
        tokens = _transform(state, name, patch.flatten(2).mT, heads, bias, pre_norm)
        return tokens.mT.unflatten(2, (height, width))

    rows = [[encode_patch(p) for p in row.split(size, 3)] for row in x.split(size, 2)]
    return torch.cat([torch.cat(row, 3) for row in rows], 2)


def _run_block(state: State, name: str, x: Tensor, stage: int, pre_norm: bool) -> Tensor:
    statistics = (state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"])
    affine = (state[f"{name}.bn.weight"], state[f"{name}.bn.bias"])
    activated = F.relu(F.batch_norm(x, *statistics, *affine))
    encoded = activated
    for encoder in ("ste1", "ste2"):
        encoded = _encode(state, f"{name}.{encoder}", encoded, _HEADS[stage], pre_norm)
    plain = state.get(f"{name}.downsample.conv.weight")
    pooled = state.get(f"{name}.downsample.conv.conv.weight")
    last = plain is not None or pooled is not None
    stride = 2 if last and stage < 4 else 1
    if pooled is not None:
        halved = F.avg_pool2d(activated, 2, 2, ceil_mode=True, count_include_pad=False)
        shortcut = F.conv2d(halved, pooled)
    else:
        shortcut = x if plain is None else F.conv2d(activated, plain, stride=stride)
    conv = state[f"{name}.out_conv.conv.weight"]
    return F.conv2d(encoded, conv, stride=stride, padding=conv.shape[-1] // 2) + shortcut


def run_authors(state: State, images: Tensor, pre_norm: bool = False) -> tuple[Tensor, Tensor]:
    """Runs a state dict of the authors' names as their network, in evaluation.

    Args:
        state: without ``module.``.
        images: (N, C, H, W).
        pre_norm: normalise before attention and MLP.

    Returns:
        The last map (N, C, ceil(H / 32), ceil(W / 32)), and the logits (N, classes), or its mean
        where there is no head.
    """
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    x = F.conv2d(images, state["layer0.conv.conv.weight"], stride=2, padding=3)
    x = F.max_pool2d(x, 3, 2, 1)
    for stage in _HEADS:
        block = 0
        while f"layer{stage}.ConTBlock{block}.bn.weight" in state:
            x = _run_block(state, f"layer{stage}.ConTBlock{block}", x, stage, pre_norm)
            block += 1
    mean = x.mean((2, 3))
    if "fc.weight" not in state:
        return x, mean
    return x, F.linear(mean, state["fc.weight"], state["fc.bias"])


def _run_as_authors(variant: str, options: dict, state: State, images: Tensor):
    return run_authors(state, images, options["pre_norm"])


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
    # Only this form needs Detectron2.
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
    # Its norms are frozen ones, which count no batches.
    counts = ".num_batches_tracked"
    model.load_state_dict({k: v for k, v in state.items() if k not in head and counts not in k})
    features = model(images)["res5"]
    mean = features.mean((2, 3))
    return features, F.linear(mean, head["linear.weight"], head["linear.bias"]) if head else mean


# By form: a function of (variant, options, state dict, images), to the last map and the logits.
RUNNERS: dict[str, Callable[[str, dict, State, Tensor], tuple[Tensor, Tensor]]] = {
    "authors": _run_as_authors,
    "contnet": _run_contnet,
    "timm": _run_timm,
    "detectron2": _run_detectron2,
}
