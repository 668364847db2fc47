"""Results of evaluations: Markdown tables, and results.json."""

from __future__ import annotations

import fcntl
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Required, TypedDict

from contnet.evaluation.progress import Progress
from contnet.utils.files import NO_GUARD, WriteGuard, atomic_write, open_regular, writing
from contnet.utils.records import peek_record, recover_record, warn_once
from contnet.utils.text import printable

__all__ = [
    "RESULTS_FILE",
    "markdown_table",
    "markdown_tables",
    "read_results",
    "record_results",
    "split_metrics",
    "truncate_results",
]

RESULTS_FILE = "results.json"
# Lock file for changes of results.json, because evaluations may run during a training.
_LOCK = f"{RESULTS_FILE}.lock"
# Metrics of one class, such as "AP-person" and "min(IoU, B-Iou)-road".
_OF_A_CLASS = re.compile(r"([^-(]*(?:\([^)]*\))?)-(.+)")
# Fields that identify a record; a later record with the same values replaces it.
_KEYS = ("iteration", "dataset", "weights", "ema")


def _cell(value: object) -> str:
    if isinstance(value, str):
        return printable(value).replace("|", "\\|")
    return f"{value:.2f}" if math.isfinite(value) else "n/a"


def markdown_table(corner: str, rows: Mapping[str, Mapping[str, object]]) -> str:
    """Returns a Markdown table of rows by name, with a column for each key of any row."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [[corner, *columns], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(row.get(key, "") for key in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def split_metrics(
    metrics: Mapping[str, Mapping[str, float] | float],
) -> tuple[dict[str, dict], dict[str, dict], dict[str, dict]]:
    """Splits metrics by task into three tables.

    Args:
        metrics: metrics by task. Detectron2's evaluators name those of a class ``AP-person``.

    Returns:
        The main metrics by task, average recalls by task, and metrics by class, which are named
        ``bbox AP``.
    """
    main, recalls, by_class = {}, {}, {}
    for task, values in metrics.items():
        for key, value in (values if isinstance(values, Mapping) else {"value": values}).items():
            if match := _OF_A_CLASS.fullmatch(key):
                metric, name = match.groups()
                by_class.setdefault(name, {})[f"{task} {metric}"] = value
            else:
                rows = recalls if key.startswith("AR") else main
                rows.setdefault(task, {})[key] = value
    return main, recalls, by_class


def markdown_tables(dataset: str, metrics: Mapping[str, Mapping[str, float] | float]) -> str:
    """Returns Markdown tables of the main metrics, the average recalls and the metrics by class.

    Args:
        dataset: name of the data set.
        metrics: as in :func:`split_metrics`.
    """
    parts = zip((dataset, "average recall", "class"), split_metrics(metrics), strict=True)
    return "\n\n".join(markdown_table(corner, rows) for corner, rows in parts if rows)


def _plain(value: object) -> object:
    """Converts a value to JSON's types; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {key: _plain(below) for key, below in value.items()}
    if isinstance(value, str):
        return value
    return float(value) if math.isfinite(value) else None


class _Record(TypedDict, total=False):
    """The fields of a record that are read; other fields are kept."""

    iteration: Required[int | None]
    dataset: Required[str]
    weights: Required[str | None]
    metrics: Required[dict[str, dict[str, float | str | None] | float | str | None]]
    ema: bool  # earlier versions had another name for it
    images_seen: float | None
    warnings: list[str]


def read_results(output_dir: str) -> list[dict]:
    """Returns the records of results.json; none if the file does not exist or is damaged."""
    return peek_record(Path(output_dir, RESULTS_FILE), list[_Record]) or []


@contextmanager
def _locked(output_dir: str) -> Iterator[None]:
    """Context that locks results.json, if the file system supports locks."""
    path = Path(output_dir, _LOCK)
    with writing(path):
        lock = open_regular(path, "ab")
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX)
        except OSError as error:
            warn_once(
                f"{path} cannot be locked ({error.strerror}): evaluations that end at the same "
                "time may lose results"
            )
        yield


def _recover(output_dir: str) -> list[dict]:
    return recover_record(Path(output_dir, RESULTS_FILE), list[_Record]) or []


def _write(output_dir: str, records: Sequence[dict], guard: WriteGuard) -> None:
    with atomic_write(Path(output_dir, RESULTS_FILE), "w", guard) as file:
        json.dump(records, file, indent=1, allow_nan=False)


def record_results(
    output_dir: str,
    results: Mapping[str, Mapping],
    *,
    iteration: int | None,
    weights: str | None,
    ema: bool,
    images_seen: int | None = None,
    loss: float | None = None,
    skipped: Mapping[str, int] | None = None,
    warnings: Mapping[str, Sequence[str]] | None = None,
    float32_precision: str = "",
    protocols: Mapping[str, Mapping] | None = None,
    guard: WriteGuard = NO_GUARD,
) -> None:
    """Adds an evaluation to results.json.

    Args:
        output_dir: the run's folder.
        results: metrics by data set and task.
        iteration: the last iteration of the weights' training; None if it is unknown.
        weights: file of the weights in evaluation only; None in training.
        ema: whether the weights were an EMA.
        images_seen: in training, the number of images seen.
        loss: in training, the loss of that iteration; None in evaluation only.
        skipped: number of images that could not be read, by data set; 0 by default.
        warnings: warnings that concern the metrics, one line each, by data set.
        float32_precision: SOLVER.FLOAT32_PRECISION.
        protocols: from :func:`contnet.evaluation.protocol.describe_protocol`, by data set.
        guard: as in :func:`contnet.utils.files.atomic_write`.
    """
    seen = {} if images_seen is None else {"images_seen": images_seen}
    added = [
        {
            "iteration": iteration,
            **seen,
            "dataset": dataset,
            "weights": weights,
            "ema": ema,
            "float32_precision": float32_precision,
            "loss": None if loss is None else {"total_loss": _plain(loss), "smoothed": False},
            "metrics": _plain(metrics),
            "skipped_images": (skipped or {}).get(dataset, 0),
            "warnings": list((warnings or {}).get(dataset, ())),
            **(protocols or {}).get(dataset, {}),
        }
        for dataset, metrics in results.items()
    ]
    keys = [[each[key] for key in _KEYS] for each in added]
    with _locked(output_dir):
        earlier = _recover(output_dir)
        kept = [each for each in earlier if [each.get(key) for key in _KEYS] not in keys]
        _write(output_dir, kept + added, guard)


def truncate_results(output_dir: str, done: Progress, guard: WriteGuard = NO_GUARD) -> None:
    """Removes the results that a resumed run will compute again; keeps those of --eval-only.

    Args:
        output_dir: the run's folder.
        done: progress of the checkpoint.
        guard: as in :func:`contnet.utils.files.atomic_write`.
    """
    with _locked(output_dir):
        records = _recover(output_dir)
        alone = [each["weights"] or each["iteration"] is None for each in records]
        kept = [
            each if apart else done.recounted(each)
            for each, apart in zip(records, alone, strict=True)
            if apart or done.keeps(each)
        ]
        if kept != records:
            _write(output_dir, kept, guard)
