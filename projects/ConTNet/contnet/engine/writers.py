"""Writes and reads the metrics of a run, and truncates them to a checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter

from contnet.evaluation.progress import Progress
from contnet.utils.errors import UserError
from contnet.utils.files import NO_GUARD, WriteGuard, atomic_write, set_aside, writing
from contnet.utils.records import DamagedFile, begin_anew, parse_record, read_bytes, warn_once
from contnet.utils.text import plural

__all__ = ["METRICS_FILE", "build_writers", "read_metrics", "truncate_metrics"]

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
_WINDOW = 20  # iterations of the median losses on the console


def _parse_line(text: bytes) -> dict | None:
    try:
        line = parse_record(text, dict[str, float])
    except ValueError:
        return None
    return line if isinstance(line.get("iteration"), int) else None


def _parse(data: bytes) -> tuple[list[dict], int]:
    """Returns valid lines of metrics.json and the number of damaged ones; skips a cut last line."""
    *texts, last = data.split(b"\n")
    if last and (last[:1] != b"{" or last[-1:] == b"}"):
        texts.append(last)
    lines = [_parse_line(text) for text in texts]
    return [line for line in lines if line is not None], lines.count(None)


def read_metrics(output_dir: str | Path) -> list[dict]:
    """Returns the undamaged lines of metrics.json; none if the file does not exist."""
    path = Path(output_dir, METRICS_FILE)
    try:
        lines, damaged = _parse(read_bytes(path) or b"")
    except UserError as error:
        warn_once(f"{error}: it is skipped")
        return []
    if damaged:
        warn_once(f"{path}: {plural(damaged, 'damaged line')} skipped")
    return lines


def truncate_metrics(output_dir: str, done: Progress, guard: WriteGuard = NO_GUARD) -> None:
    """Removes the lines of metrics.json that a resumed run will write again.

    A file with damaged lines is kept under another name.

    Args:
        output_dir: the run's folder.
        done: progress of the checkpoint.
        guard: as in :func:`contnet.utils.files.atomic_write`.
    """
    path = Path(output_dir, METRICS_FILE)
    try:
        data = read_bytes(path)
    except DamagedFile as error:
        begin_anew(path, error)
        return
    if data is None:
        return
    lines, damaged = _parse(data)
    kept = [done.recounted(line) for line in lines if done.keeps(line)]
    with atomic_write(path, "w", guard) as file:
        file.writelines(json.dumps(line, sort_keys=True) + "\n" for line in kept)
        if damaged:
            file.flush()  # fails before the old file is moved if the disk is full
            logger.warning(
                f"{path} has {plural(damaged, 'damaged line')}: it is set aside as "
                f"{set_aside(path)}, and written again without them"
            )


class _MetricsWriter(JSONWriter):
    """Detectron2's writer, which keeps only complete lines if the disk is full."""

    def __init__(self, path: Path):
        super().__init__(str(path), window_size=1)
        self._path = path

    def write(self) -> None:
        with writing(self._path):
            size = self._path.stat().st_size  # fails if the folder was deleted
            try:
                super().write()
            except OSError:
                self.close()
                os.truncate(self._path, size)
                raise

    def close(self) -> None:
        with contextlib.suppress(OSError):  # write() has raised it
            super().close()


class _EventsWriter(TensorboardXWriter):
    """Detectron2's writer, which stops if the disk is full; metrics.json has the same data."""

    failed = False

    def write(self) -> None:
        if self.failed:
            return
        try:
            super().write()
        except OSError as error:
            self.failed = True
            logger.warning(f"TensorBoard's files cannot be written any more ({error})")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _TellsOfSmoothing(logging.LoggerAdapter):
    """Adds to each progress line how its losses are smoothed."""

    def process(self, msg: str, kwargs: dict) -> tuple[str, dict]:
        return f"{msg}  (losses: medians of the last {_WINDOW} iterations)", kwargs


def build_writers(output_dir: str, start_iter: int, max_iter: int) -> list[EventWriter]:
    """Builds writers for the console, and for metrics.json and TensorBoard without smoothing."""
    progress = CommonMetricPrinter(max_iter, window_size=_WINDOW)
    progress.logger = _TellsOfSmoothing(progress.logger)
    return [
        progress,
        _MetricsWriter(Path(output_dir, METRICS_FILE)),
        _EventsWriter(output_dir, window_size=1, purge_step=start_iter),
    ]
