"""A plain implementation of ConTNet, as the reference for speed and results.

Each encoder unfolds its feature map into patches and folds it again, attention is an explicit
softmax, maps stay (N, C, H, W), and an image whose sides are not multiples of 224 is padded as a
whole. It calls the layers of a :class:`~contnet.modeling.contnet.ConTNet`, but does not share the
code of its blocks and encoders.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contnet.modeling.block import ConTBlock, PooledShortcut
from contnet.modeling.contnet import ConTNet
from contnet.modeling.encoder import Attention, Encoder, Mlp

__all__ = ["IMAGE_UNIT", "run_plain"]

IMAGE_UNIT = 224  # stride 32 times patch size 7


def _relative_bias(attention: Attention, size: int) -> Tensor:
    """Returns the bias of each head and pair of tokens (heads, P*P, P*P), tokens row by row."""
    axis = torch.arange(size)
    row, column = axis.repeat_interleave(size), axis.repeat(size)
    down, right = (part[:, None] - part + size - 1 for part in (row, column))
    return attention.bias_table[down * (2 * size - 1) + right].permute(2, 0, 1)


def _attend(attention: Attention, x: Tensor, size: int) -> Tensor:
    heads = attention.num_heads
    qkv = attention.qkv(x)
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, 2))
    weights = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if attention.bias_table is not None:
        weights = weights + _relative_bias(attention, size)
    weights = F.dropout(weights.softmax(-1), attention.drop, attention.training)
    x = (weights @ v).transpose(1, 2).flatten(2)
    return attention.proj_drop(attention.proj(x))


def _run_mlp(mlp: Mlp, x: Tensor) -> Tensor:
    return mlp.drop(mlp.fc2(mlp.drop(F.gelu(mlp.fc1(x)))))


def _normalise(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _encode(encoder: Encoder, x: Tensor) -> Tensor:
    """Cuts a map (N, C, H, W) into patches, encodes them and joins them again."""
    n, c, h, w = x.shape
    size = encoder.patch_size
    tokens = x.unfold(2, size, size).unfold(3, size, size)
    tokens = tokens.permute(0, 2, 3, 4, 5, 1).reshape(-1, size, size, c)
    if encoder.row_table is not None:
        half = c // 2
        first, second = tokens[..., :half], tokens[..., half:]
        tokens = torch.cat([first + encoder.row_table, second + encoder.col_table], 3)
    tokens = tokens.reshape(-1, size * size, c)
    if encoder.pre_norm:
        tokens = tokens + _attend(encoder.attn, _normalise(encoder.norm1, tokens), size)
        tokens = tokens + _run_mlp(encoder.mlp, _normalise(encoder.norm2, tokens))
    else:
        tokens = _normalise(encoder.norm1, tokens + _attend(encoder.attn, tokens, size))
        tokens = _normalise(encoder.norm2, tokens + _run_mlp(encoder.mlp, tokens))
    tokens = tokens.reshape(n, h // size, w // size, size, size, c)
    return tokens.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


def _run_block(block: ConTBlock, x: Tensor) -> Tensor:
    activated = F.relu(block.norm(x))
    encoded = activated
    for encoder in block.encoders:
        encoded = _encode(encoder, encoded)
    if block.shortcut is None:
        shortcut = x
    elif isinstance(block.shortcut, PooledShortcut):
        pooled = F.avg_pool2d(activated, 2) if block.stride == 2 else activated
        shortcut = block.shortcut.conv(pooled)
    else:
        shortcut = F.conv2d(activated, block.shortcut.weight, stride=block.stride)
    return block.out_drop(block.drop_path(block.conv(encoded)) + shortcut)


def run_plain(model: ConTNet, images: Tensor) -> Tensor:
    """Computes a ConTNet with the plain implementation.

    Args:
        model: network with output stride 32. Its results equal those of this function if H and W
            are multiples of 224; for other sizes, only this function pads the images.
        images: images (N, C, H, W).

    Returns:
        Logits (N, num_classes).
    """
    h, w = images.shape[-2:]
    x = F.pad(images, (0, -w % IMAGE_UNIT, 0, -h % IMAGE_UNIT))
    x = model.pool(model.stem(x))
    for stage in model.stages:
        for block in stage:
            x = _run_block(block, x)
    return model.head(x.mean((2, 3)))
