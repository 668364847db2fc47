"""The report of a detector: its AP, losses, and boxes beside the truth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from contnet.report.curves import (
    Curve,
    by_iteration,
    loss_curve,
    loss_keys,
    score_curve,
    series,
)
from contnet.report.page import Curves, Facts, Gallery, Section, Tiles, write_page
from contnet.report.pictures import ReportImage
from contnet.utils.text import printable

__all__ = ["write_detection_report"]

_Rows = Mapping[int, Mapping[str, float]]

# What the page shows large: key, name, format.
_TILES = (
    ("bbox/AP", "box AP", ".1f"),
    ("bbox/AP50", "box AP50", ".1f"),
    ("bbox/AP75", "box AP75", ".1f"),
    ("total_loss", "last loss", ".3f"),
)
# Over all classes; those of the second are drawn, the others only listed.
_SCORE = re.compile(r"(bbox|segm)/AP[0-9a-z]*")
_DRAWN_SCORE = re.compile(r"(bbox|segm)/AP(50|75)?")


def _last_numbers(rows: _Rows) -> dict[str, str]:
    found = {name: (series(rows, key)[1], form) for key, name, form in _TILES}
    return {name: format(values[-1], form) for name, (values, form) in found.items() if values}


def _last_class_scores(rows: _Rows, class_names: Sequence[str]) -> dict[str, float]:
    """AP of each class at the last evaluation that knew it."""
    found = {name: series(rows, f"bbox/{printable(f'AP-{name}')}")[1] for name in class_names}
    return {name: values[-1] for name, values in found.items() if values}


def _ap_curve(rows: _Rows, scores: Sequence[str]) -> Curve:
    return score_curve(
        rows,
        [key for key in scores if _DRAWN_SCORE.fullmatch(key)],
        ylabel="AP",
        label="Average precision against iteration",
        caption="Average precision on the validation images.",
    )


def _curves(rows: _Rows) -> list[Curves]:
    losses = loss_keys(rows)
    scores = sorted({key for row in rows.values() for key in row if _SCORE.fullmatch(key)})
    curves = [loss_curve(rows)] if losses else []
    if scores:
        curves.append(_ap_curve(rows, scores))
    return [Curves("Curves", curves, losses + scores, rows)] if curves else []


def write_detection_report(
    path: str | Path,
    *,
    title: str,
    images: Sequence[ReportImage],
    metrics: Sequence[Mapping[str, float]],
    summary: Mapping[str, object],
    class_names: Sequence[str],
) -> Path:
    """Writes the report of a detector's run; a part of which there is nothing is left out.

    Args:
        path: the page's file; its folder is made, an older page is replaced in one step.
        title: heading of the page.
        images: images to show with their boxes.
        metrics: lines of Detectron2's metrics.json. `iteration` is needed in each; `total_loss`,
            `loss_*`, `bbox/AP*` and `segm/AP*` are drawn and listed where a line has them. Values
            that are not finite are listed and not drawn.
        summary: what the table at the top says, in this order.
        class_names: names that `Box.class_index` points to.

    Returns:
        The path that was written.

    Raises:
        ValueError: an image that is no uint8 (H, W, 3) array, or a box of an unknown class.
        KeyError: a line of `metrics` without `iteration`.
    """
    rows = by_iteration(metrics)
    sections: list[Section] = []
    if numbers := _last_numbers(rows):
        sections.append(Tiles(numbers))
    sections += [Facts("The run", summary), *_curves(rows)]
    if scores := _last_class_scores(rows, class_names):
        sections.append(Facts("Box AP by class", scores))
    if images:
        sections.append(Gallery("Detections beside ground truth", class_names, images))
    return write_page(path, title, sections)
