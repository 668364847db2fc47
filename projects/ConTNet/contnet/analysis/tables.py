"""Tables that the reports of all kinds of models share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from contnet.report.page import Matrix, Section, Table

__all__ = ["confusion_section", "difference_table"]

_MOST_CLASSES = 100  # maximum for a matrix
_MOST_PAIRS = 200  # confused pairs that are listed for more classes


def confusion_section(
    heading: str, rows: Sequence[str], columns: Sequence[str], counts: np.ndarray, note: str
) -> Section:
    """Returns a confusion matrix, or the most confused pairs if there are very many classes.

    Args:
        heading: heading of the section.
        rows, columns: names of the true and the predicted classes.
        counts: (R, C).
        note: text that explains what is counted.
    """
    if len(rows) <= _MOST_CLASSES:
        return Matrix(heading, "truth \\ predicted", rows, columns, counts, note)
    wrong = counts * ~np.eye(*counts.shape, dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [np.unravel_index(place, counts.shape) for place in order]
    listed = [(rows[i], [columns[j], int(wrong[i, j])]) for i, j in pairs if wrong[i, j]]
    note = f"{note} The most confused pairs of {len(rows)} classes."
    return Table(heading, ["truth", "predicted", "number"], listed, note)


def difference_table(
    title: str,
    first: str,
    differences: Mapping[str, Mapping[str, tuple[float, float, float]]],
    resamples: int,
    seed: int,
) -> Table:
    """Returns a table of the differences between runs' metrics and those of the first run.

    Args:
        title: name of the data set.
        first: name of the first run.
        differences: by run and metric: difference, lower and upper end of the interval, in percent.
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.
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
        f"Intervals from a paired bootstrap: images are drawn with replacement {resamples} times "
        f"(seed {seed}), the same ones for both runs. They show the effect of the choice of "
        "images, not of the training seed."
    )
    return Table(f"Difference from {first}: {title}", ["metric", *differences], rows, note)
