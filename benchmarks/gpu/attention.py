"""Compares the attention kernels: differences, unsupported inputs, and times."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.margins import compare_margins
from benchmarks.gpu.part import Part, is_refusal, reason, time_ways
from contnet.modeling.encoder import attention_mask

__all__ = ["KERNELS", "compare_kernels", "measure_attention"]

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_MASKS = ("none", "margins", "relative", "relative and margins")
_HEAD_DIM = 64


@dataclass
class _Case:
    """Inputs of attention within patches, as in the network."""

    qkv: Tensor  # (patches, tokens, 3 * channels)
    valid: Tensor | None
    bias: Tensor | None

    def attend(self) -> Tensor:
        b, t, c = self.qkv.shape
        shape = (b, t, c // 3 // _HEAD_DIM, _HEAD_DIM)
        q, k, v = (each.reshape(shape).transpose(1, 2) for each in self.qkv.chunk(3, dim=2))
        mask = attention_mask(self.valid, self.bias)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def forward_and_backward(self) -> tuple[Tensor, ...]:
        leaves = [self.qkv] if self.bias is None else [self.qkv, self.bias]
        out = self.attend()
        # A different gradient for each channel of a token, without random numbers.
        weights = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype, device=out.device)
        return out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)

    def in_float32(self) -> _Case:
        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().float().requires_grad_()

        return _Case(leaf(self.qkv), self.valid, leaf(self.bias))


def _make_case(device: str, patches: int, tokens: int, heads: int, mask: str) -> _Case:
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    qkv = torch.randn(patches, tokens, 3 * heads * _HEAD_DIM, **options).bfloat16()
    valid = bias = None
    if "margins" in mask:  # the last columns of every eighth patch
        side = math.isqrt(tokens)
        valid = torch.ones(patches, side, side, dtype=torch.bool, device=device)
        valid[::8, :, side // 2 :] = False
        valid = valid.flatten(1)
    if "relative" in mask:
        bias = torch.randn(1, heads, tokens, tokens, **options).bfloat16().requires_grad_()
    return _Case(qkv.requires_grad_(), valid, bias)


def _with_kernel(kernel: str, function: Callable[[], object]) -> object:
    with sdpa_kernel(KERNELS[kernel]):
        return function()


def _differences(taken: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Returns the largest difference of each tensor, relative to its largest value."""
    return [
        ((mine.float() - each).abs().max() / each.abs().max().clamp(min=1e-6)).item()
        for mine, each in zip(taken, exact, strict=True)
    ]


def _compare(part: Part, kernel: str, case: _Case, row: dict) -> None:
    exact = _with_kernel("math", case.in_float32().forward_and_backward)
    both = partial(_with_kernel, kernel, case.forward_and_backward)
    forward = partial(_with_kernel, kernel, case.attend)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            out, *gradients = _differences(both(), exact)
        except RuntimeError as error:
            if not is_refusal(error):
                raise
            why = [str(each.message).partition(" (Trig")[0] for each in said]
            # Messages about the disabled kernels are not reasons.
            why = [each for each in why if not each.endswith(("because:", "runtime disabled."))]
            part.record("attention", **row, refused=" ".join(why)[:300] or reason(error))
            return
    del exact
    rounds = 5 if part.on_gpu else 1
    with torch.no_grad():
        (alone,) = time_ways(part, {kernel: forward}, rounds).values()
    (together,) = time_ways(part, {kernel: both}, rounds).values()
    part.record(
        "attention",
        **row,
        difference=out,
        gradient_difference=max(gradients),
        forward_ms=median(alone),
        forward_and_backward_ms=median(together),
    )


def compare_kernels(part: Part) -> None:
    """Compares each kernel in bfloat16 with an explicit softmax in float32."""
    # Shapes of the first stage at 224 px and 128 images, whose encoders have patch sizes 7 and 14.
    shapes = [(8192, 49, 1), (2048, 196, 2)] if part.on_gpu else [(8, 49, 1), (8, 196, 2)]
    cases = [(*shape, mask) for shape in shapes for mask in _MASKS]
    many = (65536, 49, 1, "none")  # more patches than some kernels support
    if part.on_gpu:
        cases.append(many)
    else:
        part.record("attention", patches=many[0], left_out="too many for a CPU")
    # Results of the earlier kernels are kept if a kernel crashes the process.
    for kernel in KERNELS:
        for patches, tokens, heads, mask in cases:
            row = {"patches": patches, "tokens": tokens, "heads": heads, "mask": mask}
            row["kernel"] = kernel
            with part.fence("attention", **row):
                case = _make_case(part.device, patches, tokens, heads, mask)
                _compare(part, kernel, case, row)


def measure_attention(part: Part) -> None:
    """Compares the kernels, and the ways to handle margins.

    The margins come first, because one of the kernels may end the process.
    """
    compare_margins(part)
    compare_kernels(part)
