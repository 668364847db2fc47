"""A simple, slow ConTNet with the authors' tensor names, for comparison with the fast one.

It is written from the published description, and simple enough to check by reading. Each encoder
loops over its patches and computes attention within a patch with an explicit softmax; at the right
and bottom borders, patches are smaller. Nothing is padded or masked, so the same code works for all
sizes. It has no dropout, and shares no code with :mod:`contnet.modeling` or with the conversion of
weights, so it can verify both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["VARIANTS", "Block", "Encoder", "ReferenceNetwork"]

_HEADS = (1, 2, 4, 8)
_PATCHES = ((7, 14), (7, 14), (7, 14), (7, 7))


class Variant(NamedTuple):
    """Channels of the stem, blocks of each stage, and hidden widths of its MLPs."""

    dim: int
    depths: tuple[int, ...]
    mlp_dims: tuple[int, ...]


VARIANTS = {
    "contnet_ti": Variant(48, (1, 1, 1, 1), (196, 392, 768, 768)),
    "contnet_s": Variant(64, (1, 1, 1, 1), (256, 512, 1024, 1024)),
    "contnet_m": Variant(64, (2, 2, 2, 2), (256, 512, 1024, 1024)),
    "contnet_b": Variant(64, (3, 4, 6, 3), (256, 512, 1024, 1024)),
}


class Conv(nn.Module):
    """A convolution without bias under the name `conv`; a call may override its stride."""

    def __init__(self, dim: int, out_dim: int, kernel_size: int, stride: int = 1):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(dim, out_dim, kernel_size, stride, padding, bias=False)

    def forward(self, x: Tensor, stride: int | None = None) -> Tensor:
        return F.conv2d(x, self.conv.weight, None, stride or self.conv.stride, self.conv.padding)


class PooledConv(nn.Module):
    """The shortcut of ``use_avgdown``: a 2x2 mean, then a 1x1 convolution."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = Conv(dim, out_dim, 1)

    def forward(self, x: Tensor, stride: int = 2) -> Tensor:
        if stride == 2:
            return self.conv(F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False))
        # Replicated borders give windows that cross the border the mean of their real pixels.
        return self.conv(F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1))


def _relative_index(size: int) -> Tensor:
    """Returns the row in the relative position table for each pair of tokens (P*P, P*P)."""
    row, column = torch.meshgrid(*[torch.arange(size)] * 2, indexing="ij")
    row, column = row.flatten(), column.flatten()
    down, right = (each[:, None] - each + size - 1 for each in (row, column))
    return down * (2 * size - 1) + right


class Attention(nn.Module):
    """Multi-head self-attention of one patch's tokens."""

    def __init__(self, dim: int, num_heads: int, patch_size: int, relative: bool, qkv_bias: bool):
        super().__init__()
        self.num_heads, self.patch_size, self.relative = num_heads, patch_size, relative
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if relative:
            offsets = (2 * patch_size - 1) ** 2
            self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))
            self.register_buffer("relative_position_index", _relative_index(patch_size))

    def _bias(self, height: int, width: int) -> Tensor:
        """Returns the bias (heads, T, T) for the top left height x width tokens of a patch."""
        grid = torch.arange(self.patch_size**2).view(self.patch_size, self.patch_size)
        tokens = grid[:height, :width].flatten()
        index = self.relative_position_index[tokens][:, tokens]
        return self.relative_position_bias_table[index].permute(2, 0, 1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Applies attention to tokens (N, height * width, C), which are ordered row by row."""
        split = (part.unflatten(2, (self.num_heads, -1)) for part in self.qkv(x).chunk(3, 2))
        q, k, v = (part.transpose(1, 2) for part in split)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        if self.relative:
            scores = scores + self._bias(height, width)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Encoder(nn.Module):
    """A transformer layer that is applied to each patch of a map separately."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        patch_size: int,
        relative: bool,
        pre_norm: bool,
        qkv_bias: bool,
    ):
        super().__init__()
        self.patch_size, self.pre_norm = patch_size, pre_norm
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, patch_size, relative, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_dim)
        self.pe = None
        if not relative:
            rows = nn.Parameter(torch.zeros(1, patch_size, 1, dim // 2))
            columns = nn.Parameter(torch.zeros(1, 1, patch_size, dim // 2))
            self.pe = nn.ParameterList([rows, columns])

    def _position(self, height: int, width: int) -> Tensor:
        """Returns position embeddings: first half of the channels by row, second half by column."""
        rows = self.pe[0][:, :height].expand(1, height, width, -1)
        columns = self.pe[1][:, :, :width].expand(1, height, width, -1)
        return torch.cat([rows, columns], dim=3)

    def _encode_patch(self, patch: Tensor) -> Tensor:
        """Encodes one patch (N, C, h, w), which may be smaller at the border."""
        height, width = patch.shape[2:]
        x = patch.permute(0, 2, 3, 1)
        if self.pe is not None:
            x = x + self._position(height, width)
        x = x.flatten(1, 2)
        if self.pre_norm:
            x = x + self.attn(self.norm1(x), height, width)
            x = x + self.mlp(self.norm2(x))
        else:
            x = self.norm1(x + self.attn(x, height, width))
            x = self.norm2(x + self.mlp(x))
        return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = [row.split(self.patch_size, 3) for row in x.split(self.patch_size, 2)]
        encoded = [torch.cat([self._encode_patch(patch) for patch in row], 3) for row in rows]
        return torch.cat(encoded, 2)


class Block(nn.Module):
    """Norm, ReLU, two encoders, a convolution and a shortcut."""

    def __init__(
        self, stage: int, variant: Variant, last: bool, use_avgdown: bool, **encoder: bool
    ):
        super().__init__()
        dim = variant.dim * 2**stage
        self.bn = nn.BatchNorm2d(dim)
        first, second = (
            Encoder(dim, _HEADS[stage], variant.mlp_dims[stage], size, **encoder)
            for size in _PATCHES[stage]
        )
        self.ste1, self.ste2 = first, second
        self.downsample = None
        if not last:
            self.out_conv = Conv(dim, dim, 3)
        elif stage == 3:
            self.out_conv = Conv(dim, 2 * dim, 1)
            self.downsample = Conv(dim, 2 * dim, 1)
        else:
            self.out_conv = Conv(dim, 2 * dim, 3, 2)
            pair = (dim, 2 * dim)
            self.downsample = PooledConv(*pair) if use_avgdown else Conv(*pair, 1, 2)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the activated map, and the two encoders' output for it."""
        activated = F.relu(self.bn(x))
        return activated, self.ste2(self.ste1(activated))

    def forward(self, x: Tensor) -> Tensor:
        activated, encoded = self.encode(x)
        shortcut = x if self.downsample is None else self.downsample(activated)
        return self.out_conv(encoded) + shortcut

    def dense(self, x: Tensor) -> Tensor:
        """Returns the output at stride 1: `forward(x)` equals `dense(x)[..., ::2, ::2]`."""
        activated, encoded = self.encode(x)
        return self.out_conv(encoded, stride=1) + self.downsample(activated, stride=1)


class ReferenceNetwork(nn.Module):
    """A ConTNet with the authors' names; arguments are those of ``contnet.create_model``."""

    def __init__(
        self,
        name: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        use_avgdown: bool = False,
        relative: bool = False,
        pre_norm: bool = False,
        qkv_bias: bool = True,
    ):
        super().__init__()
        variant = VARIANTS[name]
        encoder = {"relative": relative, "pre_norm": pre_norm, "qkv_bias": qkv_bias}
        self.layer0 = nn.ModuleDict({"conv": Conv(in_chans, variant.dim, 7, 2)})
        for stage, depth in enumerate(variant.depths):
            blocks = {
                f"ConTBlock{i}": Block(stage, variant, i == depth - 1, use_avgdown, **encoder)
                for i in range(depth)
            }
            self.add_module(f"layer{stage + 1}", nn.ModuleDict(blocks))
        self.fc = nn.Linear(16 * variant.dim, num_classes) if num_classes else nn.Identity()

    def stem(self, x: Tensor) -> Tensor:
        """Applies the 7x7 convolution of stride 2, then the 3x3 max-pool of stride 2."""
        return F.max_pool2d(self.layer0["conv"](x), 3, 2, 1)

    def layers(self) -> list[list[Block]]:
        """Returns the blocks of the four stages."""
        return [list(getattr(self, f"layer{i}").values()) for i in (1, 2, 3, 4)]

    def last_map(self, x: Tensor) -> Tensor:
        """Returns the map (N, C, ceil(H / 32), ceil(W / 32)) of images (N, in_chans, H, W)."""
        x = self.stem(x)
        for blocks in self.layers():
            for block in blocks:
                x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (N, num_classes), or the mean of the last map if there are no classes."""
        return self.fc(self.last_map(x).mean((2, 3)))

    def features(self, x: Tensor, taps: str = "stage") -> dict[str, Tensor]:
        """Returns the maps res2 to res5, at strides 4, 8, 16 and 32."""
        x, maps = self.stem(x), {}
        for stage, (*blocks, last) in enumerate(self.layers()):
            for block in blocks:
                x = block(x)
            name = f"res{stage + 2}"
            if stage == 3:
                maps[name] = last(x)
                break
            maps[name] = last.dense(x) if taps == "stage" else last.encode(x)[1]
            x = last(x)
        return maps
