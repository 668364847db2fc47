"""Tables that reports of all kinds of models have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from contnet.report.page import Matrix, Section, Table

__all__ = ["confusion_section", "difference_table"]

_MOST_CLASSES = 100  # of a matrix
_MOST_PAIRS = 200  # of classes that are confused, in the place of a larger one


def confusion_section(
    heading: str, rows: Sequence[str], columns: Sequence[str], counts: np.ndarray, note: str
) -> Section:
    """A confusion matrix, or of very many classes the pairs that are confused most.

    Args:
        heading: of the section.
        rows, columns: names of the true and the predicted classes.
        counts: (R, C).
        note: what counts.
    """
    if len(rows) <= _MOST_CLASSES:
        return Matrix(heading, "truth \\ predicted", rows, columns, counts, note)
    wrong = counts * ~np.eye(*counts.shape, dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [np.unravel_index(place, counts.shape) for place in order]
    listed = [(rows[i], [columns[j], int(wrong[i, j])]) for i, j in pairs if wrong[i, j]]
    note = f"{note} Of {len(rows)} classes, the pairs that are confused most."
    return Table(heading, ["truth", "predicted", "number"], listed, note)


def difference_table(
    title: str,
    first: str,
    differences: Mapping[str, Mapping[str, tuple[float, float, float]]],
    resamples: int,
    seed: int,
) -> Table:
    """How metrics of runs differ from those of the first run.

    Args:
        title: of the data set.
        first: name of the first run.
        differences: by run and metric: difference, lower and upper end of the interval, in percent.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    metrics = list(dict.fromkeys(name for each in differences.values() for name in each))
    rows = []
    for metric in metrics:
        cells = []
        for each in differences.values():
            value, lower, upper = each.get(metric, (math.nan,) * 3)
            cells.append(f"{value:+.1f}, 95 % {lower:.1f} to {upper:.1f}")
        rows.append((metric, cells))
    note = (
        f"Intervals by a paired bootstrap: {resamples} times (seed {seed}) images are drawn with "
        "replacement, the same ones for both runs. They tell of the choice of images, not of the "
        "chance in training."
    )
    return Table(f"Difference from {first}: {title}", ["metric", *differences], rows, note)
