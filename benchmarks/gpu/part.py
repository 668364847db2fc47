"""A part of the GPU check, which records each result at once, including failures."""

from __future__ import annotations

import gc
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from contnet.utils.errors import UserError

__all__ = ["Part", "Way", "is_refusal", "measure", "reason", "time_ways"]

Way = Callable[[], object]


class Part:
    """A part of the check on one device.

    Args:
        name: name of the part in the script.
        device: "cuda", or "cpu" for a small run without meaningful speeds.
        output: folder for the results and for temporary files.
    """

    def __init__(self, name: str, device: str, output: Path):
        self.name = name
        self.device = device
        self.output = output
        self.failures = 0

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def record(self, table: str, **figures: object) -> None:
        """Adds a row of a table of the report to the part's results."""
        with open(self.output / f"{self.name}.figures", "a") as file:
            print(json.dumps({"table": table, **figures}), file=file)

    @contextmanager
    def fence(self, table: str, **row: object) -> Iterator[None]:
        """Continues after an error in the block, and records it as a row with the reason.

        Inputs that an attention kernel does not support do not count as failures.
        """
        try:
            yield
        except Exception as error:  # errors of any library
            if is_refusal(error):
                self.record(table, **row, refused=reason(error))
            else:
                traceback.print_exc()
                self.failures += 1
                self.record(table, **row, failed=reason(error))
        finally:
            self.clean()

    def clean(self) -> None:
        """Frees memory."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def finish(self) -> None:
        """Raises UserError if any measurement failed."""
        if self.failures:
            raise UserError(f"{self.failures} of the part's measurements failed, see its log")


def is_refusal(error: Exception) -> bool:
    """Whether none of the enabled attention kernels supports the inputs."""
    return re.search(r"No (available kernel|viable backend)", str(error)) is not None


def reason(error: Exception) -> str:
    """Returns an error as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _peak_mb(part: Part, way: Way) -> float | None:
    """Returns a call's peak memory above what was allocated before, in MiB; None on a CPU."""
    if not part.on_gpu:
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _milliseconds(part: Part, way: Way) -> float:
    if not part.on_gpu:
        start = time.perf_counter()
        way()
        return (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    way()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def time_ways(part: Part, ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    """Times functions in turns; returns milliseconds by name, from CUDA events on a GPU."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(_milliseconds(part, way))
    return times


def measure(
    part: Part,
    table: str,
    ways: Mapping[str, Way],
    baselines: Mapping[str, str] | None = None,
    **row: object,
) -> None:
    """Records times and peak memory of functions in turns; a function that fails also has a row.

    Args:
        part: part that records the rows.
        table: table of the report.
        ways: functions to measure, by name.
        baselines: name of the baseline of each function.
        row: values that all rows have.
    """
    rounds, warmup = (5, 3) if part.on_gpu else (1, 1)
    ready: dict[str, Way] = {}
    peaks: dict[str, float | None] = {}
    for name, way in ways.items():
        with part.fence(table, way=name, **row):
            for _ in range(warmup):  # the first calls may compile or plan
                way()
            peaks[name] = _peak_mb(part, way)
            ready[name] = way
    times = time_ways(part, ready, rounds)
    for name, own in times.items():
        figures = {"milliseconds": median(own), "least": min(own), "most": max(own)}
        figures["peak_mb"] = peaks[name]
        baseline = (baselines or {}).get(name)
        if baseline in times:
            figures["baseline"] = baseline
            pairs = zip(times[baseline], own, strict=True)
            figures["speed_ratio"] = median(other / mine for other, mine in pairs if mine)
            if peaks[name] and peaks[baseline]:
                figures["peak_ratio"] = peaks[name] / peaks[baseline]
        part.record(table, way=name, **row, **figures)
