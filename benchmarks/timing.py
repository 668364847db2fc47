"""Times alternatives in turns, so that other load on the machine affects all of them."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from contnet.utils.cpus import available_cpus

__all__ = ["alternate", "describe_machine", "print_ratios"]


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(
    ways: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Times alternatives in turns.

    Args:
        ways: functions to time, by name; they are called without arguments.
        rounds: number of timed calls of each.
        warmup: number of earlier calls of each that are not timed.

    Returns:
        The seconds of each call, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(-warmup, rounds):
        for name, way in ways.items():
            _finish()
            start = time.perf_counter()
            way()
            _finish()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def print_ratios(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """Prints median and range of each alternative, and the baseline's time relative to its own.

    Args:
        seconds: result of :func:`alternate`.
        baseline: name of the alternative that the others are compared with.

    Returns:
        The speed ratio of each alternative: median over rounds of the baseline's seconds divided by
        its own.
    """
    width = max(len(name) for name in seconds)
    ratios = {}
    for name, times in seconds.items():
        ratios[name] = median(b / own for b, own in zip(seconds[baseline], times, strict=True))
        print(
            f"{name:{width}}  median {median(times) * 1e3:9.1f} ms  "
            f"({min(times) * 1e3:.1f} to {max(times) * 1e3:.1f})  {ratios[name]:6.2f} x {baseline}",
            flush=True,
        )
    return ratios


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def describe_machine() -> str:
    """Returns one line with date, processor, cores, threads, GPU (if any) and versions."""
    device = f"{_processor()}, {available_cpus()} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device += f", {torch.cuda.get_device_name()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "numpy"))
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{today}: {device}; Python {platform.python_version()}, {versions}"
