"""Forward, or forward and backward pass, of ConTNet, the plain ConTNet and other networks."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from statistics import median

import timm
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from torch import Tensor, nn
from torch.nn import functional

import contnet
from benchmarks.limits import count_parts, least_seconds, measure_ceilings
from benchmarks.plain import IMAGE_UNIT, run_plain
from benchmarks.timing import alternate, print_ratios
from contnet.modeling.contnet import GRAD_CHECKPOINTING_MODES, VARIANTS
from contnet.utils.errors import UserError

__all__ = ["add_arguments", "run"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", choices=VARIANTS, default="contnet_m")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"), help="size in pixels"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="batch size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision", choices=DTYPES, default="fp32", help="precision of ConTNet, by autocast"
    )
    parser.add_argument(
        "--plain-precision", choices=DTYPES, default="fp32", help="precision of the others"
    )
    parser.add_argument("--backward", action="store_true", help="measure forward and backward")
    parser.add_argument(
        "--checkpointing",
        choices=GRAD_CHECKPOINTING_MODES,
        default="",
        help="what ConTNet recomputes in the backward pass",
    )
    parser.add_argument(
        "--optimized", action="store_true", help="also contnet.optimize_for_inference"
    )
    parser.add_argument("--others", action="store_true", help="also ResNet-50, Swin-T, DeiT-S")
    parser.add_argument("--limit", action="store_true", help="show the machine's limit")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="timed calls of each")


def _other_networks(size: tuple[int, int]) -> dict[str, tuple[nn.Module, int]]:
    """Builds networks; returns each with the number that its image sides must be multiples of."""
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    whole = tuple(-(-side // IMAGE_UNIT) * IMAGE_UNIT for side in size)
    return {
        "Detectron2 R-50 FPN": (build_resnet_fpn_backbone(cfg, ShapeSpec(channels=3)), 32),
        "timm ResNet-50": (timm.create_model("resnet50"), 1),
        "timm Swin-T": (
            timm.create_model("swin_tiny_patch4_window7_224", img_size=whole),
            IMAGE_UNIT,
        ),
        "timm DeiT-S": (timm.create_model("deit_small_patch16_224", img_size=whole), IMAGE_UNIT),
    }


def _way(
    function: Callable[[Tensor], Tensor | dict], image: Tensor, args: argparse.Namespace, dtype: str
) -> Callable[[], None]:
    half = torch.autocast(image.device.type, DTYPES[dtype], enabled=dtype != "fp32")

    def forward() -> None:
        with half:
            out = function(image)
            out = sum(o.float().mean() for o in (out.values() if isinstance(out, dict) else [out]))
        if args.backward:
            out.backward()

    return forward


def _print_memory(ways: dict[str, Callable[[], None]]) -> None:
    for name, way in ways.items():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way()
        peak = torch.cuda.max_memory_allocated() - before
        print(f"{name}: peak of {peak / 2**20:.0f} MiB above what was allocated before")


def _print_kept(ways: dict[str, Callable[[], None]], weights: set[int]) -> None:
    """Counts the memory that a forward pass keeps for the backward pass, without weights."""
    for name, way in ways.items():
        kept = {}

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            way()
        size = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
        print(f"{name}: {size / 2**20:.0f} MiB kept for the backward pass")


def _print_limit(args: argparse.Namespace, seconds: float) -> None:
    dtype = DTYPES[args.precision]
    ceilings = measure_ceilings(args.device, dtype)
    parts = count_parts(contnet.create_model(args.variant), (args.batch, 3, *args.size))
    least = least_seconds(parts, ceilings, dtype)
    print(f"ceilings: {ceilings[0] / 1e9:.0f} GMACs/s, {ceilings[1] / 1e9:.1f} GB/s")
    for name, (macs, moved) in parts.items():
        millions = moved * dtype.itemsize / 1e6
        print(f"{name:22} {macs / 1e9:7.2f} GMACs {millions:8.1f} MB {least[name] * 1e3:8.1f} ms")
    total = sum(least.values())
    print(
        f"limit {total * 1e3:.0f} ms, measured {seconds * 1e3:.0f} ms: {total / seconds:.0%} of it"
    )


def run(args: argparse.Namespace) -> None:
    """Prints the ratios of the selected networks.

    Raises:
        UserError: if ``--optimized`` and ``--backward`` are combined.
    """
    if args.optimized and args.backward:
        raise UserError("--optimized is only for inference: remove --backward")
    torch.manual_seed(0)
    model = contnet.create_model(args.variant).train(args.backward).to(args.device)
    model.set_grad_checkpointing(args.checkpointing)
    image = torch.randn(args.batch, 3, *args.size, device=args.device)
    ways = {
        "plain": _way(lambda x: run_plain(model, x), image, args, args.plain_precision),
        "contnet": _way(model, image, args, args.precision),
    }
    if args.optimized:
        fast = contnet.optimize_for_inference(model, DTYPES[args.precision])
        ways["optimized"] = _way(fast, image, args, "fp32")
    if args.others:
        for name, (other, unit) in _other_networks(args.size).items():
            other = other.train(args.backward).to(args.device)
            fits = functional.pad(image, (0, -args.size[1] % unit, 0, -args.size[0] % unit))
            ways[name] = _way(other, fits, args, args.plain_precision)
    with contextlib.nullcontext() if args.backward else torch.inference_mode():
        # The second call records a graph.
        seconds = alternate(ways, args.rounds, warmup=2 if args.optimized else 1)
        print_ratios(seconds, "plain")
        if image.is_cuda:
            _print_memory(ways)
        if args.backward:
            _print_kept(ways, {p.untyped_storage().data_ptr() for p in model.parameters()})
    if args.limit and not args.backward:
        _print_limit(args, median(seconds["contnet"]))
