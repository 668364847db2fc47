"""Compares ConT-M with its plain implementation: time, memory, kernels, compiled encoders."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import contnet
from benchmarks.gpu.attention import KERNELS
from benchmarks.gpu.part import Part, Way, measure, time_ways
from benchmarks.plain import run_plain
from contnet.modeling.compiled import compile_encoders
from contnet.modeling.contnet import ConTNet

__all__ = [
    "make_network",
    "measure_compiled",
    "measure_inference",
    "measure_network",
    "profile_step",
    "record_profile",
]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CHOICES = (("math", "flash", "efficient", "flash or efficient"), ("cudnn",))
_BUDGETS = (1.0, 0.8)
_TOP = 20


def make_network(part: Part) -> ConTNet:
    torch.manual_seed(0)
    return contnet.create_model("contnet_m" if part.on_gpu else "contnet_ti").to(part.device)


def _batches(part: Part) -> list[Tensor]:
    shapes = [(128, 3, 224, 224), (2, 3, 800, 1333)] if part.on_gpu else [(1, 3, 61, 90)]
    return [torch.randn(shape, device=part.device) for shape in shapes]


def _size(images: Tensor) -> str:
    n, _, h, w = images.shape
    return f"{h}x{w}, batch {n}"


def _call(
    function: Callable[[Tensor], Tensor],
    images: Tensor,
    dtype: str,
    backward: bool = False,
    kernels: str = "",
) -> None:
    """Runs forward, and backward from the mean, with only the named attention kernels."""
    allowed = [KERNELS[name] for name in kernels.split(" or ")] if kernels else []
    chosen = sdpa_kernel(allowed) if allowed else contextlib.nullcontext()
    with chosen, torch.set_grad_enabled(backward):
        with torch.autocast(images.device.type, _DTYPES[dtype], enabled=dtype != "fp32"):
            out = function(images)
        if backward:
            out.float().mean().backward()


def _checkpointed(model: ConTNet, mode: str, images: Tensor) -> Tensor:
    model.set_grad_checkpointing(mode)
    try:
        return model(images)
    finally:
        model.set_grad_checkpointing("")


def _ways(model: ConTNet, images: Tensor, backward: bool) -> dict[str, Way]:
    plain = partial(run_plain, model)
    call = partial(_call, images=images, backward=backward)
    ways = {
        **{f"plain {dtype}": partial(call, plain, dtype=dtype) for dtype in _DTYPES},
        **{f"ours {dtype}": partial(call, model, dtype=dtype) for dtype in _DTYPES},
    }
    for mode in ("gelu", "mlp", "block") if backward else ():
        own = partial(_checkpointed, model, mode)
        # The mode must still be set when the backward pass recomputes activations.
        ways[f"ours bf16, {mode} computed again"] = partial(call, own, dtype="bf16")
    return ways


def _attention_ways(
    model: ConTNet, images: Tensor, backward: bool, choices: Sequence[str]
) -> dict[str, Way]:
    call = partial(_call, images=images, dtype="bf16", backward=backward)
    ways = {f"ours bf16, {name}": partial(call, model, kernels=name) for name in choices}
    return {"plain bf16": partial(call, partial(run_plain, model)), **ways}


def _baselines(ways: dict[str, Way]) -> dict[str, str]:
    return {name: "plain fp32" if "fp32" in name else "plain bf16" for name in ways}


def measure_network(part: Part) -> None:
    """Measures both implementations in both precisions, checkpointing, and attention kernels."""
    model = make_network(part)
    batches = _batches(part)
    # The kernels come last, because one of them may crash the process.
    for make in (_ways, *(partial(_attention_ways, choices=each) for each in _CHOICES)):
        for images in batches:
            for backward in (True, False):
                direction = "forward and backward" if backward else "forward"
                row = {"size": _size(images), "pass": direction}
                model.train(backward)
                ways = make(model, images, backward)
                with part.fence("network", **row):
                    measure(part, "network", ways, _baselines(ways), **row)
                model.zero_grad()


def measure_inference(part: Part) -> None:
    """Measures inference on one image: plain, ours, and after optimize_for_inference."""
    model = make_network(part).eval()
    if not part.on_gpu:
        part.record("inference", way="graphs", left_out="CUDA graphs need a GPU")
    for images in _batches(part):
        image = images[:1]
        ways = {
            **{
                f"plain {dtype}": partial(_call, partial(run_plain, model), image, dtype)
                for dtype in _DTYPES
            },
            **{f"ours {dtype}": partial(_call, model, image, dtype) for dtype in _DTYPES},
        }
        for dtype, kind in _DTYPES.items():
            for graphs, limit in (("", 4 << 30), (" without graphs", 0)):
                fast = contnet.optimize_for_inference(model, kind, max_graph_bytes=limit)
                ways[f"optimized {dtype}{graphs}"] = partial(fast, image)
        row = {"size": _size(image)}
        with part.fence("inference", **row), torch.inference_mode():
            measure(part, "inference", ways, _baselines(ways), **row)


# --- kernels -------------------------------------------------------------------------------------


def record_profile(part: Part, what: str, step: Way) -> None:
    """Records the kernels that take most of a step's time, and how busy the device is."""
    steps = 3 if part.on_gpu else 1
    for _ in range(steps):
        step()
    (times,) = time_ways(part, {"step": step}, steps).values()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if part.on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        part.synchronize()
    spent = "self_device_time_total" if part.on_gpu else "self_cpu_time_total"
    kind = torch.autograd.DeviceType.CUDA if part.on_gpu else torch.autograd.DeviceType.CPU
    events = [each for each in profiler.key_averages() if each.device_type == kind]
    events.sort(key=lambda each: -getattr(each, spent))
    total = sum(getattr(each, spent) for each in events)
    step_ms = sorted(times)[len(times) // 2]
    part.record(
        "profiled steps",
        step=what,
        milliseconds=step_ms,
        kernel_ms=total / steps / 1e3,
        busy=total / steps / 1e3 / step_ms,
        launches=sum(each.count for each in events) / steps,
    )
    for rank, each in enumerate(events[:_TOP], start=1):
        own = getattr(each, spent)
        part.record(
            "kernels",
            step=what,
            rank=rank,
            kernel=each.key[:120],
            calls=each.count / steps,
            milliseconds=own / steps / 1e3,
            share=own / total if total else None,
        )


def profile_step(part: Part) -> None:
    """Profiles the network's forward and backward pass in bfloat16, at each size."""
    model = make_network(part).train()
    for images in _batches(part):
        what = f"network, {_size(images)}"
        with part.fence("profiled steps", step=what):
            record_profile(part, what, partial(_call, model, images, "bf16", True))


# --- compiled ------------------------------------------------------------------------------------


def measure_compiled(part: Part) -> None:
    """Measures compiled encoders with memory budgets for the activations."""
    # Partitioning by a budget needs no compiler, so it also runs quickly on a CPU.
    backend = "inductor" if part.on_gpu else "aot_eager_decomp_partition"
    if not part.on_gpu:
        part.record(
            "network", way="encoders compiled by inductor", left_out=f"{backend} is used instead"
        )
    for images in _batches(part):
        for budget in _BUDGETS if part.on_gpu else _BUDGETS[1:]:
            row = {"size": _size(images), "pass": "forward and backward"}
            with part.fence("network", way=f"encoders compiled, budget {budget}", **row):
                torch._dynamo.reset()
                model = make_network(part).train()
                # A second model, so that the plain implementation is not compiled.
                plain = make_network(part).train()
                compile_encoders(model, budget, backend)
                ways = {
                    "plain bf16": partial(_call, partial(run_plain, plain), images, "bf16", True),
                    f"ours bf16, encoders compiled, budget {budget}": partial(
                        _call, model, images, "bf16", True
                    ),
                }
                measure(part, "network", ways, _baselines(ways), **row)
