"""The metrics of a run: written, read, and cut back to a checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter

from contnet.evaluation.progress import Progress
from contnet.utils.files import NO_GUARD, WriteGuard, atomic_write

__all__ = ["METRICS_FILE", "build_writers", "read_metrics", "truncate_metrics"]

METRICS_FILE = "metrics.json"
_WINDOW = 20  # iterations, whose median loss the screen shows


def read_metrics(output_dir: str | Path) -> list[dict]:
    """The lines of metrics.json, without one that was cut short; none if there is no such file."""
    path = Path(output_dir, METRICS_FILE)
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def truncate_metrics(output_dir: str, done: Progress, guard: WriteGuard = NO_GUARD) -> None:
    """Drops the lines of metrics.json that a resumed run is going to write again.

    Args:
        output_dir: the run's folder.
        done: what the checkpoint has done.
        guard: as of :func:`contnet.utils.files.atomic_write`.
    """
    path = Path(output_dir, METRICS_FILE)
    if path.exists():
        kept = [done.recounted(line) for line in read_metrics(output_dir) if done.keeps(line)]
        with atomic_write(path, "w", guard) as file:
            file.writelines(json.dumps(line, sort_keys=True) + "\n" for line in kept)


class _TellsOfSmoothing(logging.LoggerAdapter):
    """Adds to each line of progress what its losses are."""

    def process(self, msg: str, kwargs: dict) -> tuple[str, dict]:
        return f"{msg}  (losses: medians of the last {_WINDOW} iterations)", kwargs


def build_writers(output_dir: str, start_iter: int, max_iter: int) -> list[EventWriter]:
    """Progress on the screen; metrics.json and TensorBoard with unsmoothed values."""
    progress = CommonMetricPrinter(max_iter, window_size=_WINDOW)
    progress.logger = _TellsOfSmoothing(progress.logger)
    return [
        progress,
        JSONWriter(str(Path(output_dir, METRICS_FILE)), window_size=1),
        TensorboardXWriter(output_dir, window_size=1, purge_step=start_iter),
    ]
