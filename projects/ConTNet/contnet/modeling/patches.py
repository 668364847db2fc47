"""Cuts maps into patches, and merges patches into maps."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

__all__ = [
    "batch_to_space",
    "is_multiple",
    "margin_masks",
    "merge_and_crop",
    "merge_patches",
    "pad_and_partition",
    "partition_patches",
    "relative_index",
    "space_to_batch",
]


def relative_index(patch_size: int, cell_size: int) -> Tensor:
    """Returns the row of the relative bias table for each pair of tokens, int64 (P*P, P*P).

    The tokens of a patch are ordered cell by cell, as in :func:`partition_patches`.
    """
    axis = torch.arange(patch_size)
    token = torch.cartesian_prod(axis, axis).view(1, patch_size, patch_size, 2)
    token = partition_patches(token, patch_size, cell_size)[0]
    offset = token[:, None] - token[None] + patch_size - 1
    return offset[..., 0] * (2 * patch_size - 1) + offset[..., 1]


def is_multiple(size: int, of: int) -> bool:
    """Whether ``size % of == 0``; for a symbolic size of torch.export, whether this is certain."""
    if torch.jit.is_scripting():
        return size % of == 0
    fits = size % of == 0
    # torch.compile of PyTorch 2.6 can trace neither statically_known_true nor bool().
    if isinstance(fits, torch.SymBool):
        return statically_known_true(fits)
    return True if fits else False  # noqa: SIM210, sizes are tensors in jit.trace


def partition_patches(x: Tensor, patch_size: int, cell_size: int) -> Tensor:
    """Cuts a map (N, H, W, C) into patches (N * H/P * W/P, P*P, C), ordered cell by cell."""
    n, h, w, c = x.shape
    cells = patch_size // cell_size
    x = x.reshape(n, h // patch_size, cells, cell_size, w // patch_size, cells, cell_size, c)
    # Cells are ordered by columns. If they were ordered by rows, a map one patch wide would stay
    # contiguous, and torch.export would specialize that case.
    return x.permute(0, 1, 4, 2, 5, 6, 3, 7).reshape(-1, patch_size * patch_size, c)


def merge_patches(x: Tensor, patch_size: int, cell_size: int, h: int, w: int) -> Tensor:
    """Inverse of :func:`partition_patches`: merges patches into maps (N, h, w, C)."""
    c = x.shape[2]
    cells = patch_size // cell_size
    x = x.reshape(-1, h // patch_size, w // patch_size, cells, cells, cell_size, cell_size, c)
    return x.permute(0, 1, 3, 6, 2, 4, 5, 7).reshape(-1, h, w, c)


def space_to_batch(x: Tensor, dilation: int) -> Tensor:
    """Makes each grid of every ``dilation``-th pixel of (N, H, W, C) a separate image.

    Returns:
        (N * dilation**2, H / dilation, W / dilation, C); the grids of an image are consecutive.
    """
    n, h, w, c = x.shape
    x = x.reshape(n, h // dilation, dilation, w // dilation, dilation, c)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, h // dilation, w // dilation, c)


def batch_to_space(x: Tensor, dilation: int) -> Tensor:
    """Inverse of :func:`space_to_batch`."""
    _, h, w, c = x.shape
    x = x.reshape(-1, dilation, dilation, h, w, c)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, h * dilation, w * dilation, c)


def _round_up(size: int, to: int) -> int:
    return size if is_multiple(size, to) else (size + to - 1) // to * to


def pad_and_partition(x: Tensor, patch_size: int, cell_size: int, dilation: int) -> Tensor:
    """Pads a map at the right and at the bottom to whole patches, and cuts it into patches.

    Args:
        x: map (N, H, W, C).
        patch_size, cell_size: in pixels.
        dilation: distance of a patch's pixels.

    Returns:
        Tokens (B, T, C).
    """
    h, w = x.shape[1], x.shape[2]
    unit = patch_size * dilation
    if not (is_multiple(h, unit) and is_multiple(w, unit)):
        x = F.pad(x, (0, 0, 0, _round_up(w, unit) - w, 0, _round_up(h, unit) - h))
    if dilation > 1:
        x = space_to_batch(x, dilation)
    return partition_patches(x, patch_size, cell_size)


def _make_masks(
    n: int, h: int, w: int, patch_sizes: list[int], dilation: int, device: torch.device
) -> list[Tensor | None]:
    """Creates the masks of :func:`margin_masks` for a map that is padded."""
    larger, smaller = max(patch_sizes), min(patch_sizes)
    unit = larger * dilation
    rows = torch.arange(_round_up(h, unit), device=device) < h
    cols = torch.arange(_round_up(w, unit), device=device) < w
    inside = (rows[:, None] & cols)[None, :, :, None]
    if dilation > 1:
        inside = space_to_batch(inside, dilation)
    inside = partition_patches(inside, larger, smaller).squeeze(2)
    masks: list[Tensor | None] = []
    for size in patch_sizes:
        own = inside.reshape(-1, size * size)
        # A softmax over no tokens is NaN, so a patch of only padding attends to its own tokens.
        own = own | ~own.any(dim=1, keepdim=True)
        masks.append(own.reshape(inside.shape).repeat(n, 1))
    return masks


# Enough for 32 image sizes, because a network has four stages.
@lru_cache(maxsize=128)
def _kept_masks(
    stream: int, n: int, h: int, w: int, patch_sizes: tuple[int, ...], *rest
) -> list[Tensor | None]:
    """Returns masks, cached per GPU stream because streams do not wait for each other."""
    return _make_masks(n, h, w, list(patch_sizes), *rest)


def _find_masks(x: Tensor, patch_sizes: list[int], dilation: int) -> list[Tensor | None]:
    """Returns cached masks for this size, or new ones while operations are being recorded."""
    size = x.shape[:3]
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(x) is not Tensor  # as in torch.export
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return _make_masks(*size, patch_sizes, dilation, x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return _kept_masks(stream, *size, tuple(patch_sizes), dilation, x.device)


def margin_masks(x: Tensor, patch_sizes: list[int], dilation: int) -> list[Tensor | None]:
    """Returns attention masks for the patches of :func:`pad_and_partition`.

    The masks depend only on sizes, and are cached.

    Args:
        x: the map (N, H, W, C).
        patch_sizes: patch sizes of the encoders, in pixels.
        dilation: distance of a patch's pixels.

    Returns:
        For each encoder bool (B, T), False for tokens that no query attends to; None if nothing is
        padded.
    """
    n, h, w = x.shape[0], x.shape[1], x.shape[2]
    unit = max(patch_sizes) * dilation
    masks: list[Tensor | None] = [None for _ in patch_sizes]
    if not (is_multiple(h, unit) and is_multiple(w, unit)):
        if torch.jit.is_scripting():
            masks = _make_masks(n, h, w, patch_sizes, dilation, x.device)
        else:
            masks = _find_masks(x, patch_sizes, dilation)
    return masks


def merge_and_crop(
    tokens: Tensor, patch_size: int, cell_size: int, dilation: int, like: Tensor
) -> Tensor:
    """Inverse of :func:`pad_and_partition`; ``like`` is the original map."""
    h, w = like.shape[1], like.shape[2]
    unit = patch_size * dilation
    full_h, full_w = _round_up(h, unit), _round_up(w, unit)
    x = merge_patches(tokens, patch_size, cell_size, full_h // dilation, full_w // dilation)
    if dilation > 1:
        x = batch_to_space(x, dilation)
    return x.narrow(1, 0, h).narrow(2, 0, w)
