"""Attention where a map has padded margins: three ways to keep tokens from attending to padding.

The network masks all patches of a map with margins, which excludes the flash kernel. Here this is
compared with flash attention on all patches plus masked attention on the margin patches only, and
with flash attention on sequences of different lengths, without the padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.part import Part, measure
from contnet.modeling.patches import margin_masks, pad_and_partition

__all__ = ["WAYS", "PaddedPatches", "compare_margins", "make_patches"]

_HEAD_DIM = 64
_PATCH_SIZES = (7, 14)
_MASKED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_UNMASKED = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@dataclass
class PaddedPatches:
    """Tokens of a map whose patches are partly padding.

    Attributes:
        qkv: queries, keys and values (B, T, 3C), a leaf with a gradient.
        valid: bool (B, T), False for padding.
        margins: indices of the patches with padding.
        tokens: indices of the valid tokens among all (B*T).
        offsets: where each patch begins among the valid tokens, and where the last one ends.
    """

    qkv: Tensor
    valid: Tensor
    margins: Tensor
    tokens: Tensor
    offsets: Tensor


def _heads(x: Tensor) -> tuple[Tensor, ...]:
    """Splits (..., 3C) into queries, keys and values (..., heads, head dimension)."""
    return tuple(each.unflatten(-1, (-1, _HEAD_DIM)) for each in x.chunk(3, dim=-1))


def _attend(qkv: Tensor, valid: Tensor | None) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in _heads(qkv))
    mask = None if valid is None else valid[:, None, None]
    with sdpa_kernel(_UNMASKED if valid is None else _MASKED):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def _mask_all(patches: PaddedPatches) -> Tensor:
    return _attend(patches.qkv, patches.valid)


def _mask_margins(patches: PaddedPatches) -> Tensor:
    chosen = patches.margins
    masked = _attend(patches.qkv[chosen], patches.valid[chosen])
    return _attend(patches.qkv, None).index_copy(0, chosen, masked)


def _no_padding(patches: PaddedPatches) -> Tensor:
    b, t, c = patches.qkv.shape
    kept = patches.qkv.view(b * t, c)[patches.tokens]
    lengths = {"min_seqlen": 1, "max_seqlen": t}
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(each, patches.offsets, **lengths).transpose(1, 2)
        for each in _heads(kept)
    )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v)
    out = out.transpose(1, 2).values().flatten(1)
    return out.new_zeros(b * t, c // 3).index_copy(0, patches.tokens, out).view(b, t, c // 3)


WAYS = {
    "mask all patches": _mask_all,
    "mask margin patches": _mask_margins,
    "no padding": _no_padding,
}


def make_patches(
    device: str, images: int, height: int, width: int, heads: int, patch_size: int
) -> PaddedPatches:
    """Random tokens for a map of that size, as the network partitions it."""
    generator = torch.Generator(device).manual_seed(0)
    channels = 3 * heads * _HEAD_DIM
    size = (images, height, width, channels)
    x = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
    tokens = pad_and_partition(x, max(_PATCH_SIZES), min(_PATCH_SIZES), 1)
    valid = margin_masks(x, list(_PATCH_SIZES), 1)[_PATCH_SIZES.index(patch_size)]
    if valid is None:
        raise ValueError(f"{height}x{width} has no margins")
    valid = valid.reshape(-1, patch_size**2)
    return PaddedPatches(
        tokens.reshape(-1, patch_size**2, channels).contiguous().requires_grad_(),
        valid,
        (~valid.all(dim=1)).nonzero().squeeze(1),
        valid.flatten().nonzero().squeeze(1),
        F.pad(valid.sum(dim=1).cumsum(0), (1, 0)),
    )


def _step(way: str, patches: PaddedPatches, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        out = WAYS[way](patches)
    if backward:
        out.backward(out)
        patches.qkv.grad = None


def compare_margins(part: Part) -> None:
    """Times the ways for the first three stages of ConT-M on two images of 800x1333."""
    images, height, width = (2, 800, 1333) if part.on_gpu else (1, 61, 90)
    if not part.on_gpu:
        part.record("margins", way="no padding", left_out="sequences of other lengths need a GPU")
    for stage in range(3 if part.on_gpu else 1):
        h, w = (math.ceil(side / 4 / 2**stage) for side in (height, width))
        for patch_size in _PATCH_SIZES:
            row = {"map": f"{h}x{w}, batch {images}", "patch_size": patch_size}
            with part.fence("margins", **row):
                patches = make_patches(part.device, images, h, w, 1 << stage, patch_size)
                row["margin_patches"] = len(patches.margins) / len(patches.valid)
                for backward in (False, True):
                    row["pass"] = "forward and backward" if backward else "forward"
                    ways = {
                        name: partial(_step, name, patches, backward)
                        for name in WAYS
                        if part.on_gpu or name != "no padding"
                    }
                    baselines = dict.fromkeys(ways, "mask all patches")
                    measure(part, "margins", ways, baselines, **row)
