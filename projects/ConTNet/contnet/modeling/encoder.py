"""The transformer on patches: attention, MLP, and the encoder that combines them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from contnet.modeling.patches import partition_patches, relative_index

__all__ = ["Attention", "Encoder", "Mlp", "run_checkpointed"]

_DROPS = (nn.Dropout, StochasticDepth)

# torch.fx cannot trace these functions, because they depend on types, or on whether a mask is None.
torch.fx.wrap("attention_mask")
torch.fx.wrap("layer_norm")
torch.fx.wrap("mask_of_patches")


def mask_of_patches(valid: Tensor | None, tokens: int) -> Tensor | None:
    """Splits a mask of larger patches into a mask of patches with ``tokens`` tokens each."""
    return None if valid is None else valid.reshape(-1, tokens)


def attention_mask(valid: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Combines a mask (B, T) and a bias (1, heads, T, T) into one attention mask."""
    mask = None if valid is None else valid[:, None, None, :]
    if bias is None:
        return mask
    return bias if mask is None else bias.masked_fill(~mask, -math.inf)


def run_checkpointed(owner: nn.Module, part: nn.Module, *args) -> Tensor | tuple[Tensor, Tensor]:
    """Runs a part of a module, with activation checkpointing if the module enables it."""
    if owner.grad_checkpointing and owner.training and torch.is_grad_enabled():
        # Only dropout needs the random state, which is slow to restore.
        drops = any(isinstance(each, _DROPS) and each.p for each in owner.modules())
        return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=drops)
    return part(*args)


def run_after_gelu(part: nn.Module, x: Tensor) -> Tensor:
    """Returns ``part(gelu(x))``; the backward pass recomputes the GELU instead of storing it."""
    activated = F.gelu(x)
    size, place = activated.numel(), activated.data_ptr()

    def pack(kept: Tensor) -> Tensor | torch.Size:
        activated = kept.numel() == size and kept.data_ptr() == place and kept.is_contiguous()
        return kept.shape if activated else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else F.gelu(x).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return part(activated)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm that keeps half precision; its statistics are computed in float32."""
    shape = [x.shape[-1]]
    if torch.jit.is_scripting() or x.dtype == weight.dtype:
        x = F.layer_norm(x, shape, weight, bias, eps)
    else:
        # Autocast would convert x, and so all later residual sums, to float32.
        with torch.autocast(x.device.type, enabled=False):
            x = F.layer_norm(x, shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return x


class LayerNorm(nn.LayerNorm):
    """Layer norm of tokens (B, T, C) that keeps their precision, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


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

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Attends within patches.

        Args:
            x: tokens (B, T, C).
            valid: bool (B, T), False for tokens that no query attends to; None for all True.
        """
        b, t, c = x.shape
        # Chunks of the last dimension, because their gradients are joined without another copy.
        q, k, v = self.qkv(x).chunk(3, dim=2)
        shape = (b, t, self.num_heads, c // self.num_heads)
        q, k, v = q.reshape(shape), k.reshape(shape), v.reshape(shape)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        bias = None
        if self.bias_table is not None:
            bias = self.bias_table[self.index].permute(2, 0, 1)[None].to(q.dtype)
        mask = attention_mask(valid, bias)
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
        self.grad_checkpointing = False

    def _checkpoints(self, hidden: Tensor) -> bool:
        return (
            self.grad_checkpointing
            and self.training
            and self.drop.p == 0  # dropout stores as much itself
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()  # the compiler chooses what to recompute
            and not isinstance(hidden, torch.fx.Proxy)
        )

    def _project(self, hidden: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(hidden))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if torch.jit.is_scripting():
            x = self._project(x)
        else:
            x = run_after_gelu(self.fc2, x) if self._checkpoints(x) else self._project(x)
        return x


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
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)

    def _position(self) -> Tensor:
        shape = (1, self.patch_size, self.patch_size, -1)
        tables = torch.cat((self.row_table.expand(shape), self.col_table.expand(shape)), dim=3)
        return partition_patches(tables, self.patch_size, self.cell_size)

    def _run_mlp(self, x: Tensor) -> Tensor:
        return self.mlp(x) if torch.jit.is_scripting() else run_checkpointed(self, self.mlp, x)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Encodes each patch separately.

        Args:
            x: tokens (B, T, C) of the block's patches, each with one or more patches of this
                encoder.
            valid: bool (B, T), as from :func:`contnet.modeling.patches.margin_masks`, or None.
        """
        tokens = x.reshape(-1, self.patch_size * self.patch_size, x.shape[2])
        valid = mask_of_patches(valid, self.patch_size * self.patch_size)
        if self.row_table is not None:
            tokens = tokens + self._position().to(tokens.dtype)
        if self.pre_norm:
            tokens = tokens + self.attn(self.norm1(tokens), valid)
            tokens = tokens + self._run_mlp(self.norm2(tokens))
        else:
            tokens = self.norm1(tokens + self.attn(tokens, valid))
            tokens = self.norm2(tokens + self._run_mlp(tokens))
        return tokens.reshape(x.shape)
