"""The ConT block (two encoders, one convolution and a shortcut) and stages of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from contnet.modeling.encoder import Encoder, run_checkpointed
from contnet.modeling.patches import margin_masks, merge_and_crop, pad_and_partition

__all__ = ["CPU_CHUNK_ELEMENTS", "GPU_CHUNK_PATCHES", "ConTBlock", "PooledShortcut", "Stage"]

# torch.fx cannot trace these functions, because their control flow depends on the map's size.
torch.fx.wrap("margin_masks")
torch.fx.wrap("merge_and_crop")
torch.fx.wrap("mean_with_next")
torch.fx.wrap("pad_and_partition")

# Maximum number of token elements that a CPU encodes at a time, so that they fit in its cache.
CPU_CHUNK_ELEMENTS = 400_000
# Maximum number of the smaller patches per attention call on a GPU, because flash attention of
# PyTorch 2.11 fails on more.
GPU_CHUNK_PATCHES = 65_535


def mean_with_next(x: Tensor, dim: int, dilation: int) -> Tensor:
    """Averages each pixel with the one ``dilation`` pixels after it; keeps the last ones as is."""
    size = x.shape[dim]
    if size <= dilation:
        return x
    tail = x.narrow(dim, size - dilation, dilation)
    following = torch.cat([x.narrow(dim, dilation, size - dilation), tail], dim)
    return (x + following) / 2


def _convolve_at_stride_1(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Runs a convolution of any stride at stride 1, without its hooks.

    Raises:
        TypeError: if the module is not a plain convolution with its weight.
    """
    if type(conv).forward is not nn.Conv2d.forward:
        raise TypeError(
            f"a {type(conv).__name__} replaces a convolution that taps='stage' runs at "
            "stride 1 with only its weight: use taps='pre', or the classifier"
        )
    return F.conv2d(x, conv.weight, conv.bias, 1, conv.padding, conv.dilation)


class PooledShortcut(nn.Module):
    """The shortcut with ``use_avgdown``: 2x2 average pooling at stride 1 or 2, then 1x1 conv."""

    def __init__(self, dim: int, out_dim: int, stride: int, dilation: int):
        super().__init__()
        self.stride = stride
        self.dilation = dilation
        self.conv = nn.Conv2d(dim, out_dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return self.forward_dense(x)
        return self.conv(F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False))

    def forward_dense(self, x: Tensor) -> Tensor:
        """Runs at stride 1: ``forward(x)`` is ``forward_dense(x)``, sub-sampled."""
        x = mean_with_next(x, 2, self.dilation)
        return self.conv(mean_with_next(x, 3, self.dilation))


class ConTBlock(nn.Module):
    """Norm, ReLU, two encoders on patches, one convolution, and a shortcut around them.

    Args:
        dim, out_dim: channels in and out. Where they differ, the shortcut is a convolution of the
            activated input, otherwise it is the raw input.
        stride: stride of the convolution and the shortcut, 1 or 2.
        kernel_size: kernel size of the convolution.
        patch_sizes: patch sizes of the two encoders, in pixels of the map, one a multiple of the
            other.
        dilation: dilation of the convolution and of a pooled shortcut.
        patch_dilation: distance of a patch's pixels; each of the ``patch_dilation**2`` grids of
            such pixels is cut into patches.
        use_avgdown: use average pooling in the shortcut, if it is a convolution.
        **encoder: other arguments of the encoders.
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
        self.patch_sizes = list(patch_sizes)
        self.patch_size, self.cell_size = max(patch_sizes), min(patch_sizes)
        self.norm = norm_layer(dim)
        self.act = nn.ReLU()
        self.encoders = nn.ModuleList(
            Encoder(dim, patch_size=size, cell_size=self.cell_size, **encoder)
            for size in patch_sizes
        )
        padding = kernel_size // 2 * dilation
        self.conv = nn.Conv2d(
            dim, out_dim, kernel_size, stride, padding=padding, dilation=dilation, bias=False
        )
        self.shortcut = None
        if out_dim != dim and use_avgdown:
            self.shortcut = PooledShortcut(dim, out_dim, stride, dilation)
        elif out_dim != dim:
            self.shortcut = nn.Conv2d(dim, out_dim, 1, stride, bias=False)
        self.drop_path = StochasticDepth(drop_path, "row")
        self.out_drop = nn.Dropout(out_drop)

    def _run_encoders(self, tokens: Tensor, masks: list[Tensor | None]) -> Tensor:
        for i, encoder in enumerate(self.encoders):
            tokens = encoder(tokens, masks[i])
        return tokens

    def _most_at_once(self, tokens: Tensor) -> int:
        if tokens.device.type == "cpu":
            return max(1, CPU_CHUNK_ELEMENTS // (tokens.shape[1] * tokens.shape[2]))
        return GPU_CHUNK_PATCHES // (self.patch_size // self.cell_size) ** 2

    def _encode_chunks(self, tokens: Tensor, masks: list[Tensor | None]) -> Tensor:
        """Runs both encoders on patches (B, T, C), in chunks that the device supports."""
        if (
            isinstance(tokens, torch.fx.Proxy)
            or torch.jit.is_tracing()
            or torch.compiler.is_compiling()
            or tokens.shape[0] <= (count := self._most_at_once(tokens))
        ):
            return self._run_encoders(tokens, masks)
        parts = tokens.split(count)
        none = [None] * len(parts)
        cut = zip(*(none if each is None else each.split(count) for each in masks), strict=True)
        return torch.cat([self._run_encoders(*each) for each in zip(parts, cut, strict=True)])

    def encode(self, x: Tensor) -> Tensor:
        """Runs both encoders on an activated map (N, dim, H, W)."""
        x = x.permute(0, 2, 3, 1)
        cut = (self.patch_size, self.cell_size, self.patch_dilation)
        tokens = pad_and_partition(x, *cut)
        masks = margin_masks(x, self.patch_sizes, self.patch_dilation)
        if torch.jit.is_scripting():  # TorchScript cannot compile the chunks
            tokens = self._run_encoders(tokens, masks)
        else:
            tokens = self._encode_chunks(tokens, masks)
        return merge_and_crop(tokens, *cut, x).permute(0, 3, 1, 2)

    def _add(self, residual: Tensor, skip: Tensor) -> Tensor:
        return self.out_drop(self.drop_path(residual) + skip)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, dim, H, W) to (N, out_dim, ceil(H / stride), ceil(W / stride))."""
        return self.forward_pre(x)[0]

    def forward_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output, and the input of the convolution (N, dim, H, W)."""
        activated = self.act(self.norm(x))
        encoded = self.encode(activated)
        residual = self.conv(encoded)
        skip = x if self.shortcut is None else self.shortcut(activated)
        return self._add(residual, skip), encoded

    def forward_dense(self, x: Tensor) -> Tensor:
        """Returns the output at stride 1 (N, out_dim, H, W); ``forward(x)`` sub-samples it."""
        if self.stride == 1:
            return self(x)
        activated = self.act(self.norm(x))
        residual = _convolve_at_stride_1(self.conv, self.encode(activated))
        if isinstance(self.shortcut, PooledShortcut):
            skip = self.shortcut.forward_dense(activated)
        else:
            skip = _convolve_at_stride_1(self.shortcut, activated)
        return self._add(residual, skip)


class Stage(nn.Sequential):
    """A sequence of blocks, the last of which may down-sample."""

    def __init__(self, *blocks: ConTBlock):
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x) if torch.jit.is_scripting() else run_checkpointed(self, block, x)
        return x

    def _run_all_but_last(self, x: Tensor) -> tuple[Tensor, ConTBlock]:
        *blocks, last = self
        for block in blocks:
            x = run_checkpointed(self, block, x)
        return x, last

    def forward_dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output, and the output before sub-sampling."""
        x, last = self._run_all_but_last(x)
        dense = run_checkpointed(self, last.forward_dense, x)
        # A strided convolution is the stride-1 convolution sub-sampled.
        return dense[..., :: last.stride, :: last.stride], dense

    def forward_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output, and the input of the last block's convolution."""
        x, last = self._run_all_but_last(x)
        return run_checkpointed(self, last.forward_pre, x)
