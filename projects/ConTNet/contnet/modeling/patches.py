"""Cuts maps into patches and puts them together again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = [
    "batch_to_space",
    "is_multiple",
    "merge_patches",
    "partition_patches",
    "relative_index",
    "space_to_batch",
]


def relative_index(patch_size: int, cell_size: int) -> Tensor:
    """Row of the relative bias table for every pair of tokens of a patch, int64 (P*P, P*P).

    Tokens run through the patch cell after cell, as :func:`partition_patches` puts them.
    """
    axis = torch.arange(patch_size)
    token = torch.cartesian_prod(axis, axis).view(1, patch_size, patch_size, 2)
    token = partition_patches(token, patch_size, cell_size)[0]
    offset = token[:, None] - token[None] + patch_size - 1
    return offset[..., 0] * (2 * patch_size - 1) + offset[..., 1]


def is_multiple(size: int, of: int) -> bool:
    """Whether ``size % of == 0``; where torch.export has free sizes, whether that is certain."""
    fits = size % of == 0
    # jit.trace has sizes as tensors; torch.compile of PyTorch 2.6 cannot go into the function.
    return statically_known_true(fits) if isinstance(fits, torch.SymBool) else bool(fits)


def partition_patches(x: Tensor, patch_size: int, cell_size: int) -> Tensor:
    """Cuts a map (N, H, W, C) into patches (N * H/P * W/P, P*P, C), cell after cell of each."""
    n, h, w, c = x.shape
    cells = patch_size // cell_size
    x = x.reshape(n, h // patch_size, cells, cell_size, w // patch_size, cells, cell_size, c)
    # Cells by columns: by rows, a map one patch wide is as contiguous as it was, and torch.export
    # would make that a case of its own.
    return x.permute(0, 1, 4, 2, 5, 6, 3, 7).reshape(-1, patch_size * patch_size, c)


def merge_patches(x: Tensor, patch_size: int, cell_size: int, like: Tensor) -> Tensor:
    """Puts patches back into a map of the shape of ``like`` (N, H, W, C)."""
    n, h, w, c = like.shape
    cells = patch_size // cell_size
    x = x.reshape(n, h // patch_size, w // patch_size, cells, cells, cell_size, cell_size, c)
    return x.permute(0, 1, 3, 6, 2, 4, 5, 7).reshape(n, h, w, c)


def space_to_batch(x: Tensor, dilation: int) -> Tensor:
    """Makes each grid of every ``dilation``-th pixel of (N, H, W, C) an image of its own.

    Returns:
        (N * dilation**2, H / dilation, W / dilation, C), the grids of an image side by side.
    """
    n, h, w, c = x.shape
    x = x.reshape(n, h // dilation, dilation, w // dilation, dilation, c)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, h // dilation, w // dilation, c)


def batch_to_space(x: Tensor, dilation: int, like: Tensor) -> Tensor:
    """Undoes :func:`space_to_batch`; ``like`` has the joined shape (N, H, W, C)."""
    n, h, w, c = like.shape
    x = x.reshape(n, dilation, dilation, h // dilation, w // dilation, c)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(n, h, w, c)
