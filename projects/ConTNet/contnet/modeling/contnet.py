"""ConTNet, a network that alternates convolutions with transformers on patches.

Source: Yan et al., "ConTNet: Why not use convolution and transformer at the same time?", 2021,
arXiv 2104.13497. Layer sizes follow the authors' published classification code; the treatment of
maps that are no multiple of the patch, and the dense taps, are ours (docs/network.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

__all__ = [
    "CHECKPOINTS",
    "FEATURES",
    "OUTPUT_STRIDES",
    "TAPS",
    "VARIANTS",
    "ConTBlock",
    "ConTNet",
    "create_model",
    "relative_index",
]

FEATURES = ("res2", "res3", "res4", "res5")
TAPS = ("stage", "pre")
OUTPUT_STRIDES = (32, 16, 8)
# What activation checkpointing computes again: nothing, MLPs, whole blocks.
CHECKPOINTS = ("", "mlp", "block")

# Numbers of the tokens that a CPU encodes at once: what is computed from them stays in its cache.
_CACHED = 400_000

VARIANTS: dict[str, dict] = {
    "contnet_ti": {"depths": (1, 1, 1, 1), "dim": 48, "mlp_dims": (196, 392, 768, 768)},
    "contnet_s": {"depths": (1, 1, 1, 1), "dim": 64, "mlp_dims": (256, 512, 1024, 1024)},
    "contnet_m": {"depths": (2, 2, 2, 2), "dim": 64, "mlp_dims": (256, 512, 1024, 1024)},
    "contnet_b": {
        "depths": (3, 4, 6, 3),
        "dim": 64,
        "mlp_dims": (256, 512, 1024, 1024),
        "drop_rate": 0.1,
        "last_drop_rate": 0.2,
    },
}


def relative_index(patch_size: int, cell_size: int) -> Tensor:
    """Row of the relative bias table for every pair of tokens of a patch, int64 (P*P, P*P).

    Tokens run through the patch cell after cell, as :func:`_partition` puts them.
    """
    axis = torch.arange(patch_size)
    token = torch.cartesian_prod(axis, axis).view(1, patch_size, patch_size, 2)
    token = _partition(token, patch_size, cell_size)[0]
    offset = token[:, None] - token[None] + patch_size - 1
    return offset[..., 0] * (2 * patch_size - 1) + offset[..., 1]


def _is_multiple(size: int, of: int) -> bool:
    """Whether ``size % of == 0``; where torch.export has free sizes, whether that is certain."""
    fits = size % of == 0
    # jit.trace has sizes as tensors; torch.compile of PyTorch 2.6 cannot go into the function.
    return statically_known_true(fits) if isinstance(fits, torch.SymBool) else bool(fits)


def _partition(x: Tensor, patch_size: int, cell_size: int) -> Tensor:
    """Cuts a map (N, H, W, C) into patches (N * H/P * W/P, P*P, C), cell after cell of each."""
    n, h, w, c = x.shape
    cells = patch_size // cell_size
    x = x.reshape(n, h // patch_size, cells, cell_size, w // patch_size, cells, cell_size, c)
    # Cells by columns: by rows, a map one patch wide is as contiguous as it was, and torch.export
    # would make that a case of its own.
    return x.permute(0, 1, 4, 2, 5, 6, 3, 7).reshape(-1, patch_size * patch_size, c)


def _merge(x: Tensor, patch_size: int, cell_size: int, like: Tensor) -> Tensor:
    """Puts patches back into a map of the shape of ``like`` (N, H, W, C)."""
    n, h, w, c = like.shape
    cells = patch_size // cell_size
    x = x.reshape(n, h // patch_size, w // patch_size, cells, cells, cell_size, cell_size, c)
    return x.permute(0, 1, 3, 6, 2, 4, 5, 7).reshape(n, h, w, c)


def _split_phases(x: Tensor, dilation: int) -> Tensor:
    """Makes each grid of every ``dilation``-th pixel of (N, H, W, C) an image of its own.

    Returns:
        (N * dilation**2, H / dilation, W / dilation, C), the grids of an image side by side.
    """
    n, h, w, c = x.shape
    x = x.reshape(n, h // dilation, dilation, w // dilation, dilation, c)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, h // dilation, w // dilation, c)


def _join_phases(x: Tensor, dilation: int, like: Tensor) -> Tensor:
    """Undoes :func:`_split_phases`; ``like`` has the joined shape (N, H, W, C)."""
    n, h, w, c = like.shape
    x = x.reshape(n, dilation, dilation, h // dilation, w // dilation, c)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(n, h, w, c)


def _mean_with_next(x: Tensor, dim: int, dilation: int) -> Tensor:
    """Mean of each pixel and the one ``dilation`` further; alone where that lies outside."""
    size = x.shape[dim]
    if size <= dilation:
        return x
    tail = x.narrow(dim, size - dilation, dilation)
    following = torch.cat([x.narrow(dim, dilation, size - dilation), tail], dim)
    return (x + following) / 2


def _run_part(owner: nn.Module, part: nn.Module, *args) -> Tensor | tuple[Tensor, Tensor]:
    """Runs a part of a module, which may ask that its activations are computed again."""
    if owner.grad_checkpointing and owner.training and torch.is_grad_enabled():
        return checkpoint(part, *args, use_reentrant=False)
    return part(*args)


class Attention(nn.Module):
    """Multi-head self-attention within each patch, with an optional relative position bias."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        patch_size: int,
        cell_size: int,
        relative: bool,
        qkv_bias: bool,
        drop: float,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.drop = drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)
        self.bias_table = None
        if relative:
            self.bias_table = nn.Parameter(torch.zeros((2 * patch_size - 1) ** 2, num_heads))
            self.register_buffer("index", relative_index(patch_size, cell_size), persistent=False)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        """Attends within patches.

        Args:
            x: tokens (B, T, C).
            real: bool (B, T), False for tokens that no query may look at; None for all True.
        """
        b, t, c = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if real is None else real[:, None, None, :]
        if self.bias_table is not None:
            bias = self.bias_table[self.index].permute(2, 0, 1)[None].to(q.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)
        drop = self.drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(b, t, c)))


class Mlp(nn.Module):
    """Linear, GELU, linear, with dropout after each half."""

    def __init__(self, dim: int, hidden_dim: int, drop: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Encoder(nn.Module):
    """The paper's STE: one transformer layer whose sequences are the patches of a map."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        patch_size: int,
        cell_size: int,
        relative: bool,
        pre_norm: bool,
        qkv_bias: bool,
        drop: float,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.cell_size = cell_size
        self.pre_norm = pre_norm
        self.grad_checkpointing = False
        self.row_table = self.col_table = None
        if not relative:
            self.row_table = nn.Parameter(torch.zeros(1, patch_size, 1, dim // 2))
            self.col_table = nn.Parameter(torch.zeros(1, 1, patch_size, dim // 2))
        self.attn = Attention(dim, num_heads, patch_size, cell_size, relative, qkv_bias, drop)
        self.mlp = Mlp(dim, mlp_dim, drop)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def _position(self) -> Tensor:
        shape = (1, self.patch_size, self.patch_size, -1)
        tables = torch.cat((self.row_table.expand(shape), self.col_table.expand(shape)), dim=3)
        return _partition(tables, self.patch_size, self.cell_size)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        """Encodes each patch on its own.

        Args:
            x: tokens (B, T, C) of the block's patches, each of one or more of this encoder's.
            real: bool (B, T), False on padding; None where there is none.
        """
        tokens = x.reshape(-1, self.patch_size**2, x.shape[2])
        if real is not None:
            real = real.reshape(-1, self.patch_size**2)
            # A softmax over nothing is NaN: a patch of padding only attends to itself instead.
            real = real | ~real.any(dim=1, keepdim=True)
        if self.row_table is not None:
            tokens = tokens + self._position()
        if self.pre_norm:
            tokens = tokens + self.attn(self.norm1(tokens), real)
            tokens = tokens + _run_part(self, self.mlp, self.norm2(tokens))
        else:
            tokens = self.norm1(tokens + self.attn(tokens, real))
            tokens = self.norm2(tokens + _run_part(self, self.mlp, tokens))
        return tokens.reshape(x.shape)


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

    def _encode_patches(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        """Both encoders on patches (B, T, C); on a CPU as many at a time as its cache holds."""
        if tokens.device.type != "cpu" or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return self._run_encoders(tokens, real)
        count = max(1, _CACHED // (tokens.shape[1] * tokens.shape[2]))
        parts = tokens.split(count)
        masks = [None] * len(parts) if real is None else real.split(count)
        return torch.cat([self._run_encoders(*each) for each in zip(parts, masks, strict=True)])

    def _run_encoders(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        for encoder in self.encoders:
            tokens = encoder(tokens, real)
        return tokens

    def _encode(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        unit = self.patch_size * self.patch_dilation
        x = x.permute(0, 2, 3, 1)
        real = None
        if not (_is_multiple(h, unit) and _is_multiple(w, unit)):
            full_h, full_w = (h + unit - 1) // unit * unit, (w + unit - 1) // unit * unit
            x = F.pad(x, (0, 0, 0, full_w - w, 0, full_h - h))
            rows = torch.arange(full_h, device=x.device) < h
            cols = torch.arange(full_w, device=x.device) < w
            real = (rows[:, None] & cols)[None, :, :, None]
        whole = x
        if self.patch_dilation > 1:
            x = _split_phases(x, self.patch_dilation)
            real = None if real is None else _split_phases(real, self.patch_dilation)
        tokens = _partition(x, self.patch_size, self.cell_size)
        if real is not None:
            real = _partition(real, self.patch_size, self.cell_size).squeeze(2)
            real = real.repeat(tokens.shape[0] // real.shape[0], 1)
        x = _merge(self._encode_patches(tokens, real), self.patch_size, self.cell_size, x)
        if self.patch_dilation > 1:
            x = _join_phases(x, self.patch_dilation, whole)
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


class ConTNet(nn.Module):
    """ConTNet, classifier and feature extractor in one.

    Args:
        depths: blocks of each of the four stages.
        dim: channels of the stem; stage i works on ``dim * 2**i``, with ``2**i`` heads.
        mlp_dims: hidden width of each stage's MLPs.
        num_classes: of the classifier; 0 leaves it out.
        in_chans: channels of the input image.
        relative: a relative bias table in each attention instead of absolute position tables.
        pre_norm: normalise before attention and MLP instead of after their residual sums.
        use_avgdown: average-pool in the down-sampling shortcuts.
        qkv_bias: give the query, key and value projection a bias.
        drop_rate: dropout in the encoders of stages 3 and 4, in [0, 1).
        last_drop_rate: dropout on the residual sum of the very last block, in [0, 1).
        drop_path_rate: stochastic depth of the last block's residual, rising linearly from 0.
        norm_layer: makes the norm that opens each block from a number of channels.
        taps: where the features of stages 1 to 3 are taken. "stage": the last block's output,
            computed at stride 1 (twice the stage's channels). "pre": the input of the last
            block's convolution (the stage's channels).
        output_stride: of the last map, one of ``OUTPUT_STRIDES``. Below 32 the last stages keep
            their resolution and dilate instead; weights and their meaning stay the same.
        dilated_patches: where convolutions dilate, so do the patches (the same area and the
            published function); otherwise patches are of adjacent pixels (a smaller area).
    """

    def __init__(
        self,
        depths: Sequence[int],
        dim: int,
        mlp_dims: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        relative: bool = False,
        pre_norm: bool = False,
        use_avgdown: bool = False,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        last_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] | None = None,
        taps: str = "stage",
        output_stride: int = 32,
        dilated_patches: bool = True,
    ):
        super().__init__()
        if taps not in TAPS:
            raise ValueError(f"taps is {taps!r}, it must be one of {', '.join(TAPS)}")
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride is {output_stride!r}, it must be 32, 16 or 8")
        self.taps = taps
        self.output_stride = output_stride
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dim * 16
        self.grad_checkpointing = False
        self.stem = nn.Conv2d(in_chans, dim, 7, stride=2, padding=3, bias=False)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        drop_path_step = drop_path_rate / max(sum(depths) - 1, 1)
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            final = i == len(depths) - 1
            dilation = max((4 << i) // output_stride, 1)
            blocks = nn.ModuleList()
            for j in range(depth):
                last = j == depth - 1
                blocks.append(
                    ConTBlock(
                        dim << i,
                        dim << (i + last),
                        stride=2 if last and not final and 8 << i <= output_stride else 1,
                        kernel_size=1 if last and final else 3,
                        patch_sizes=(7, 7) if final else (7, 14),
                        dilation=dilation,
                        patch_dilation=dilation if dilated_patches else 1,
                        use_avgdown=use_avgdown and not final,
                        norm_layer=norm_layer or nn.BatchNorm2d,
                        drop_path=drop_path_step * (sum(depths[:i]) + j),
                        out_drop=last_drop_rate if last and final else 0.0,
                        num_heads=1 << i,
                        mlp_dim=mlp_dims[i],
                        relative=relative,
                        pre_norm=pre_norm,
                        qkv_bias=qkv_bias,
                        drop=drop_rate if i >= 2 else 0.0,
                    )
                )
            self.stages.append(blocks)
        self.head = self._make_head()
        self._set_feature_facts(dim)
        self.apply(self._init_weights)

    def _make_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return nn.Linear(self.num_features, self.num_classes)

    def _set_feature_facts(self, dim: int) -> None:
        channels = [dim << (i + (self.taps == "stage")) for i in range(3)] + [dim * 16]
        self.out_feature_channels = dict(zip(FEATURES, channels, strict=True))
        self.out_feature_strides = {
            name: min(4 << i, self.output_stride) for i, name in enumerate(FEATURES)
        }
        self.feature_info = [
            {"num_chs": channels[i], "reduction": stride, "module": f"stages.{i}"}
            for i, stride in enumerate(self.out_feature_strides.values())
        ]

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Attention) and module.bias_table is not None:
            nn.init.trunc_normal_(module.bias_table, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of norms, biases and position tables, which weight decay should leave alone."""
        tables = ("row_table", "col_table", "bias_table")
        return {n for n, p in self.named_parameters() if p.ndim == 1 or n.endswith(tables)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns of the layer groups, in timm's form, for layer-wise decay."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        """Computes parts again in the backward pass instead of keeping their activations.

        Args:
            enable: "block" or True for whole blocks, "mlp" for the encoders' MLPs alone, which
                costs less time and saves less memory; "" or False for nothing.

        Raises:
            ValueError: for anything else.
        """
        part = "block" if enable is True else enable or ""
        if part not in CHECKPOINTS:
            raise ValueError(f"enable is {enable!r}, it must be a bool, 'mlp' or 'block'")
        self.grad_checkpointing = part == "block"
        for module in self.modules():
            if isinstance(module, Encoder):
                module.grad_checkpointing = part == "mlp"

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Puts a new head of ``num_classes`` outputs (0: none) in the place of the present one.

        Raises:
            ValueError: for a pooling other than the mean, which is all that ConTNet has.
        """
        if global_pool != "avg":
            raise ValueError(f"global_pool is {global_pool!r}, ConTNet has only 'avg'")
        self.num_classes = num_classes
        self.head = self._make_head().to(self.stem.weight)
        self.head.apply(self._init_weights)

    def _tapped_stage(self, name: str, stage: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
        """A stage's output, and the features ``name`` before down-sampling."""
        *blocks, last = stage
        for block in blocks:
            x, _ = _run_part(self, block, x)
        if self.taps == "pre" and name != FEATURES[-1]:
            return _run_part(self, last, x)
        tap, _ = _run_part(self, last, x, True)
        # A strided convolution is the stride-1 convolution sub-sampled.
        return tap[..., :: last.stride, :: last.stride], tap

    def forward_features(
        self, x: Tensor, out_features: Sequence[str] | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Runs the stem and the stages.

        Args:
            x: images (N, in_chans, H, W) of any size.
            out_features: names from ``FEATURES``.

        Returns:
            The last map (N, num_features, ceil(H / 32), ceil(W / 32)), or, with ``out_features``,
            a dict of maps by name, at strides 4, 8, 16 and 32 (or ``output_stride``, if that is
            less). Stages after the last name do not run, and no stage pays for features that were
            not asked for.

        Raises:
            ValueError: for a name that is none of ``FEATURES``.
        """
        wanted = tuple(out_features or ())
        if unknown := [name for name in wanted if name not in FEATURES]:
            raise ValueError(f"no feature {unknown[0]!r}, there are {', '.join(FEATURES)}")
        depth = max((FEATURES.index(name) + 1 for name in wanted), default=len(FEATURES))
        features = {}
        # The blocks work on channels last, as partitions into patches are cheapest there.
        x = self.pool(self.stem(x.contiguous(memory_format=torch.channels_last)))
        for name, stage in zip(FEATURES[:depth], self.stages, strict=False):
            if name in wanted:
                x, features[name] = self._tapped_stage(name, stage, x)
            else:
                for block in stage:
                    x, _ = _run_part(self, block, x)
        return features if wanted else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features by stage number, as timm's feature wrappers ask for them.

        Args:
            x: images (N, in_chans, H, W).
            indices: stages, negative ones counted from the end; a number n for the last n; None
                for all.
            norm: must be False, there is no final norm.
            stop_early: do not run stages after the last index (with ``intermediates_only``).
            output_fmt: must be "NCHW".
            intermediates_only: return the list alone, not (last map, list).
        """
        if norm or output_fmt != "NCHW":
            raise ValueError("ConTNet has no final norm, and gives its features as NCHW only")
        names = [FEATURES[i] for i in self._stage_numbers(indices)]
        if intermediates_only:
            wanted = names if stop_early else (*names, FEATURES[-1])
            features = self.forward_features(x, wanted)
            return [features[name] for name in names]
        features = self.forward_features(x, (*names, FEATURES[-1]))
        return features[FEATURES[-1]], [features[name] for name in names]

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = None,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drops the stages after the last index, and the head; returns the indices kept."""
        numbers = self._stage_numbers(indices)
        self.stages = self.stages[: max(numbers) + 1]
        if prune_head:
            self.reset_classifier(0)
        return numbers

    @staticmethod
    def _stage_numbers(indices: int | Sequence[int] | None) -> list[int]:
        count = len(FEATURES)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            return list(range(count))[-indices:]
        return [range(count)[i] for i in indices]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, num_classes) of the last map, or its mean (N, num_features)."""
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))


def create_model(name: str, num_classes: int = 1000, **options) -> ConTNet:
    """Builds a ConTNet with random weights.

    Args:
        name: one of ``VARIANTS``.
        num_classes: of the classifier; 0 leaves it out.
        **options: keyword arguments of :class:`ConTNet`; None keeps the variant's own value.

    Raises:
        ValueError: for an unknown name.
        TypeError: for an unknown option.
    """
    if name not in VARIANTS:
        raise ValueError(f"no ConTNet is called {name!r}, there are {', '.join(VARIANTS)}")
    given = {key: value for key, value in options.items() if value is not None}
    return ConTNet(**{**VARIANTS[name], "num_classes": num_classes, **given})
