"""A part of the GPU check: what it measures is recorded at once, and a failure is a figure too."""

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
    """One part, on one device.

    Args:
        name: as the script has it.
        device: "cuda", or "cpu", where everything is small and tells no speed.
        output: folder for the figures, and for what a part leaves only while it runs.
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
        """Adds a line to the part's figures: a row of a table of the report."""
        with open(self.output / f"{self.name}.figures", "a") as file:
            print(json.dumps({"table": table, **figures}), file=file)

    @contextmanager
    def fence(self, table: str, **row: object) -> Iterator[None]:
        """Goes on after whatever fails in the block, which becomes a row with the reason.

        That a kernel of attention refuses what it is asked for is no failure.
        """
        try:
            yield
        except Exception as error:  # of any library
            if is_refusal(error):
                self.record(table, **row, refused=reason(error))
            else:
                traceback.print_exc()
                self.failures += 1
                self.record(table, **row, failed=reason(error))
        finally:
            self.clean()

    def clean(self) -> None:
        """Gives memory back."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def finish(self) -> None:
        """Raises UserError if anything failed."""
        if self.failures:
            raise UserError(f"{self.failures} of the part's measurements failed, see its log")


def is_refusal(error: Exception) -> bool:
    """Whether no kernel of attention that may be taken can do what it should."""
    return re.search(r"No (available kernel|viable backend)", str(error)) is not None


def reason(error: Exception) -> str:
    """One short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _peak_mb(part: Part, way: Way) -> float | None:
    """MiB that a call takes at its peak, above what was there before; None on a CPU."""
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
    """Milliseconds of each call of each way, in turn, by the events of a GPU."""
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
    """Times ways in turn and takes their peaks; each has a row, also if it fails.

    Args:
        part: it records.
        table: of the report.
        ways: what to call, by name.
        baselines: the way that a way is compared with.
        row: what all rows have.
    """
    rounds, warmup = (5, 3) if part.on_gpu else (1, 1)
    ready: dict[str, Way] = {}
    peaks: dict[str, float | None] = {}
    for name, way in ways.items():
        with part.fence(table, way=name, **row):
            for _ in range(warmup):  # each of the first calls may plan something anew
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
