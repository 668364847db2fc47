"""The ConT block: two encoders, one convolution and a shortcut."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from contnet.modeling.encoder import Encoder
from contnet.modeling.patches import (
    batch_to_space,
    is_multiple,
    merge_patches,
    partition_patches,
    space_to_batch,
)

__all__ = ["CPU_CHUNK_ELEMENTS", "ConTBlock", "PooledShortcut", "Shortcut"]

# Elements of the tokens that a CPU encodes at a time, so that they stay in its cache.
CPU_CHUNK_ELEMENTS = 400_000


def _mean_with_next(x: Tensor, dim: int, dilation: int) -> Tensor:
    """Mean of each pixel and the one ``dilation`` further; alone where that lies outside."""
    size = x.shape[dim]
    if size <= dilation:
        return x
    tail = x.narrow(dim, size - dilation, dilation)
    following = torch.cat([x.narrow(dim, dilation, size - dilation), tail], dim)
    return (x + following) / 2


class Shortcut(nn.Conv2d):
    """1x1 projection of the shortcut, at stride 1 or 2."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__(dim, out_dim, 1, bias=False)

    def forward(self, x: Tensor, stride: int, dilation: int) -> Tensor:
        return F.conv2d(x, self.weight, stride=stride)


class PooledShortcut(nn.Module):
    """The same with ``use_avgdown``: a 2x2 mean instead of every second pixel."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 1, bias=False)

    def forward(self, x: Tensor, stride: int, dilation: int) -> Tensor:
        if stride == 2:
            x = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        else:
            x = _mean_with_next(_mean_with_next(x, 2, dilation), 3, dilation)
        return self.conv(x)


class ConTBlock(nn.Module):
    """Norm, ReLU, two encoders on patches, one convolution, and a shortcut around them.

    Args:
        dim, out_dim: channels in and out. Where they differ, the shortcut is a convolution of the
            activated input, otherwise it is the raw input.
        stride: 1 or 2, of the convolution and the shortcut.
        kernel_size: of the convolution.
        patch_sizes: of the two encoders, in pixels of the map, one a multiple of the other.
        dilation: of the convolution and of a pooled shortcut.
        patch_dilation: a patch takes every so many-th pixel; the map is cut into patches for each
            of the ``patch_dilation**2`` grids of such pixels.
        use_avgdown: average-pool in the shortcut, where it is a convolution.
        encoder: the encoders' other arguments.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        stride: int,
        kernel_size: int,
        patch_sizes: Sequence[int],
        dilation: int,
        patch_dilation: int,
        use_avgdown: bool,
        norm_layer: Callable[[int], nn.Module],
        drop_path: float,
        out_drop: float,
        **encoder,
    ):
        super().__init__()
        self.stride = stride
        self.patch_dilation = patch_dilation
        self.patch_size, self.cell_size = max(patch_sizes), min(patch_sizes)
        self.norm = norm_layer(dim)
        self.encoders = nn.ModuleList(
            Encoder(dim, patch_size=size, cell_size=self.cell_size, **encoder)
            for size in patch_sizes
        )
        padding = kernel_size // 2 * dilation
        self.conv = nn.Conv2d(
            dim, out_dim, kernel_size, stride, padding=padding, dilation=dilation, bias=False
        )
        self.shortcut = None
        if out_dim != dim:
            self.shortcut = (PooledShortcut if use_avgdown else Shortcut)(dim, out_dim)
        self.drop_path = StochasticDepth(drop_path, "row")
        self.out_drop = nn.Dropout(out_drop)

    def _encode_patches(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """Both encoders on patches (B, T, C); on a CPU as many at a time as its cache holds."""
        if tokens.device.type != "cpu" or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return self._run_encoders(tokens, valid)
        count = max(1, CPU_CHUNK_ELEMENTS // (tokens.shape[1] * tokens.shape[2]))
        parts = tokens.split(count)
        masks = [None] * len(parts) if valid is None else valid.split(count)
        return torch.cat([self._run_encoders(*each) for each in zip(parts, masks, strict=True)])

    def _run_encoders(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        for encoder in self.encoders:
            tokens = encoder(tokens, valid)
        return tokens

    def _encode(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        unit = self.patch_size * self.patch_dilation
        x = x.permute(0, 2, 3, 1)
        valid = None
        if not (is_multiple(h, unit) and is_multiple(w, unit)):
            full_h, full_w = (h + unit - 1) // unit * unit, (w + unit - 1) // unit * unit
            x = F.pad(x, (0, 0, 0, full_w - w, 0, full_h - h))
            rows = torch.arange(full_h, device=x.device) < h
            cols = torch.arange(full_w, device=x.device) < w
            valid = (rows[:, None] & cols)[None, :, :, None]
        whole = x
        if self.patch_dilation > 1:
            x = space_to_batch(x, self.patch_dilation)
            valid = None if valid is None else space_to_batch(valid, self.patch_dilation)
        tokens = partition_patches(x, self.patch_size, self.cell_size)
        if valid is not None:
            valid = partition_patches(valid, self.patch_size, self.cell_size).squeeze(2)
            valid = valid.repeat(tokens.shape[0] // valid.shape[0], 1)
        x = merge_patches(self._encode_patches(tokens, valid), self.patch_size, self.cell_size, x)
        if self.patch_dilation > 1:
            x = batch_to_space(x, self.patch_dilation, whole)
        return x.narrow(1, 0, h).narrow(2, 0, w).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, dense: bool = False) -> tuple[Tensor, Tensor]:
        """Runs the block.

        Args:
            x: map (N, dim, H, W).
            dense: convolve at stride 1, whatever the block's own stride.

        Returns:
            The output (N, out_dim, ceil(H / stride), ceil(W / stride)), and what the second encoder
            made (N, dim, H, W), the input of the convolution.
        """
        stride = 1 if dense else self.stride
        activated = F.relu(self.norm(x))
        encoded = self._encode(activated)
        conv = self.conv
        residual = F.conv2d(encoded, conv.weight, None, stride, conv.padding, conv.dilation)
        skip = x
        if self.shortcut is not None:
            skip = self.shortcut(activated, stride, conv.dilation[0])
        return self.out_drop(self.drop_path(residual) + skip), encoded
