"""Growth of the time and memory of a forward pass with the number of pixels."""

from __future__ import annotations

import argparse
import gc
import resource
import time
from multiprocessing import get_context
from statistics import median

import numpy as np
import torch

import contnet
from contnet.modeling.contnet import VARIANTS

__all__ = ["SIZES", "add_arguments", "run"]

# Height and width of the images, in pixels.
SIZES = ((256, 400), (512, 800), (800, 1333), (1600, 2000), (2304, 3472))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", choices=VARIANTS, default="contnet_m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed calls of each")


def _start_peak(device: str) -> int:
    """Resets the peak of memory if possible; returns the bytes in use."""
    if device == "cpu":  # whose peak cannot be reset
        return _peak(device)
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(device: str) -> int:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def _measure(variant: str, size: tuple[int, int], device: str, rounds: int) -> tuple[float, int]:
    """Returns the median seconds of a forward pass, and its peak above the bytes in use."""
    model = contnet.create_model(variant).eval().to(device)
    image = torch.randn(1, 3, *size, device=device)
    seconds = []
    with torch.inference_mode():
        model(image[..., :224, :224])
        gc.collect()
        before = _start_peak(device)
        for _ in range(rounds + 1):
            start = time.perf_counter()
            model(image).sum().item()
            seconds.append(time.perf_counter() - start)
    return median(seconds[1:]), _peak(device) - before


def run(args: argparse.Namespace) -> None:
    """Prints time and memory for each size, and the exponents that fit them best."""
    pixels, seconds, memory = [], [], []
    for size in SIZES:
        # A separate process, because the peak of a process cannot be reset.
        with get_context("spawn").Pool(1) as pool:
            took, peak = pool.apply(_measure, (args.variant, size, args.device, args.rounds))
        pixels.append(size[0] * size[1])
        seconds.append(took)
        memory.append(peak)
        print(
            f"{size[0]} x {size[1]}: {pixels[-1] / 1e6:.2f} megapixels, {took * 1e3:.1f} ms, "
            f"{peak / 2**20:.0f} MiB",
            flush=True,
        )
    for what, values in {"time": seconds, "memory": memory}.items():
        exponent = np.polyfit(np.log(pixels), np.log(values), 1)[0]
        print(f"{what} grows with the power {exponent:.3f} of the pixels")
