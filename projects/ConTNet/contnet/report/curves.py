"""Numbers and curves of a run, as SVG in the page."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "ap_curve",
    "by_iteration",
    "format_number",
    "loss_curve",
    "running_median",
    "series",
    "shown_columns",
]

# Mid-tones that stand out from white and from black.
_LINE_COLOURS = ("#d1680b", "#2a86c8", "#1a9a6c", "#c14e9c", "#8b6fd6", "#a08a12", "#d64545")
_SENTINEL = "#010203"  # Stands for the text colour in matplotlib's SVG.


def by_iteration(metrics: Iterable[Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Merges the lines of one iteration; of two values of one key, the later line's holds."""
    merged: dict[int, dict[str, float]] = {}
    for line in metrics:
        values = {key: value for key, value in line.items() if key != "iteration"}
        merged.setdefault(int(line["iteration"]), {}).update(values)
    return dict(sorted(merged.items()))


def series(rows: Mapping[int, Mapping[str, float]], key: str) -> tuple[list[int], list[float]]:
    """The finite values of one key, as iterations and values."""
    points = [(i, row[key]) for i, row in rows.items() if math.isfinite(row.get(key, math.nan))]
    return [i for i, _ in points], [value for _, value in points]


def shown_columns(rows: Mapping[int, Mapping[str, float]]) -> list[str]:
    """The keys that the page shows, in its order: losses, then AP over all classes."""
    keys = {key for row in rows.values() for key in row}
    losses = sorted(key for key in keys if key.startswith("loss_"))
    scores = sorted(key for key in keys if re.fullmatch(r"(bbox|segm)/AP[0-9a-z]*", key))
    return [key for key in ("total_loss",) if key in keys] + losses + scores


def format_number(value: object) -> str:
    """A value of a table, with few digits."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10 else f"{value:.2f}"
    return str(value)


def running_median(values: list[float]) -> list[float]:
    """The median over a centred window of about a twentieth of the series."""
    reach = len(values) // 40
    return [
        statistics.median(values[max(i - reach, 0) : i + reach + 1]) for i in range(len(values))
    ]


def _new_figure(ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("iteration", color=_SENTINEL)
    axes.set_ylabel(ylabel, color=_SENTINEL)
    axes.tick_params(colors=_SENTINEL, length=3)
    axes.grid(color=_SENTINEL, alpha=0.15, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set(color=_SENTINEL, visible=side in ("left", "bottom"))
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """A figure as an inline <svg> in the page's text colour and font."""
    if figure.axes[0].get_legend_handles_labels()[1]:
        figure.axes[0].legend(frameon=False, fontsize=8.5, labelcolor=_SENTINEL)
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": label, "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    opening, body = re.search("<svg([^>]*)>(.*)", stream.getvalue(), re.DOTALL).groups()
    view_box = re.search('viewBox="[^"]*"', opening).group()
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = body.replace(_SENTINEL, "currentColor")
    return f'<svg role="img" aria-label="{escape(label)}" {view_box}>{body}'


def loss_curve(rows: Mapping[int, Mapping[str, float]]) -> str:
    """All losses: their running medians, and faintly each value of the total."""
    figure, axes = _new_figure("loss")
    keys = [key for key in shown_columns(rows) if key.startswith(("total_loss", "loss_"))]
    for index, key in enumerate(keys):
        x, y = series(rows, key)
        colour = _LINE_COLOURS[index % len(_LINE_COLOURS)]
        if key == "total_loss":
            axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
        width = 2.2 if key == "total_loss" else 1.2
        marker = "o" if len(x) == 1 else None
        axes.plot(x, running_median(y), color=colour, linewidth=width, marker=marker, label=key)
    axes.set_ylim(bottom=0)
    return _svg(figure, "Loss against iteration")


def ap_curve(rows: Mapping[int, Mapping[str, float]]) -> str:
    """Average precision over all classes."""
    figure, axes = _new_figure("AP")
    keys = [key for key in shown_columns(rows) if re.fullmatch(r"(bbox|segm)/AP(50|75)?", key)]
    for index, key in enumerate(keys):
        x, y = series(rows, key)
        colour = _LINE_COLOURS[(index + 1) % len(_LINE_COLOURS)]
        axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=4.5, label=key)
    axes.set_ylim(0, 100)
    return _svg(figure, "Average precision against iteration")
