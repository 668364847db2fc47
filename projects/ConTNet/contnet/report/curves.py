"""Numbers of a run, and curves of them as SVG."""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contnet.utils.text import printable

if TYPE_CHECKING:  # importing matplotlib writes into the user's home
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Curve",
    "by_iteration",
    "loss_curve",
    "loss_keys",
    "running_median",
    "score_curve",
    "series",
]

# Mid-tones that stand out from white and from black.
_LINE_COLOURS = ("#d1680b", "#2a86c8", "#1a9a6c", "#c14e9c", "#8b6fd6", "#a08a12", "#d64545")
_SENTINEL = "#010203"  # Stands for the text colour in matplotlib's SVG.
_LONGEST_LABEL = 60  # letters


@dataclass(frozen=True)
class Curve:
    """A drawing in the page's text colour and font.

    Attributes:
        label: what it shows, for those who cannot see it.
        caption: stands below it.
        view_box: SVG's viewBox.
        body: SVG elements.
    """

    label: str
    caption: str
    view_box: str
    body: str


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


def loss_keys(rows: Mapping[int, Mapping[str, float]]) -> list[str]:
    """The keys of losses, the total first."""
    keys = {key for row in rows.values() for key in row}
    total = [key for key in ("total_loss",) if key in keys]
    return total + sorted(key for key in keys if key.startswith("loss_"))


def running_median(values: list[float]) -> list[float]:
    """The median over a centred window of about a twentieth of the series."""
    reach = len(values) // 40
    return [
        statistics.median(values[max(i - reach, 0) : i + reach + 1]) for i in range(len(values))
    ]


def _label(key: str) -> str:
    """A key as matplotlib writes it, which would read what stands between dollar signs as TeX."""
    return printable(key, _LONGEST_LABEL).replace("$", r"\$")


def _new_figure(ylabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("iteration", color=_SENTINEL)
    axes.set_ylabel(ylabel, color=_SENTINEL)
    axes.tick_params(colors=_SENTINEL, length=3)
    axes.grid(color=_SENTINEL, alpha=0.15, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set(color=_SENTINEL, visible=side in ("left", "bottom"))
    return figure, axes


def _curve(figure: Figure, label: str, caption: str) -> Curve:
    import matplotlib

    if figure.axes[0].get_legend_handles_labels()[1]:
        figure.axes[0].legend(frameon=False, fontsize=8.5, labelcolor=_SENTINEL)
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    settings = {"svg.hashsalt": label, "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The reader's browser has fonts of its own.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    opening, body = re.search("<svg([^>]*)>(.*)</svg>", stream.getvalue(), re.DOTALL).groups()
    view_box = re.search('viewBox="([^"]*)"', opening).group(1)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    return Curve(label, caption, view_box, body.replace(_SENTINEL, "currentColor").strip())


def loss_curve(rows: Mapping[int, Mapping[str, float]]) -> Curve:
    """All losses: their running medians, and faintly each value of the total."""
    figure, axes = _new_figure("loss")
    for index, key in enumerate(loss_keys(rows)):
        x, y = series(rows, key)
        colour = _LINE_COLOURS[index % len(_LINE_COLOURS)]
        if key == "total_loss":
            axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
        width = 2.2 if key == "total_loss" else 1.2
        marker = "o" if len(x) == 1 else None
        axes.plot(
            x, running_median(y), color=colour, linewidth=width, marker=marker, label=_label(key)
        )
    axes.set_ylim(bottom=0)
    return _curve(figure, "Loss against iteration", "Losses; lines are running medians.")


def score_curve(
    rows: Mapping[int, Mapping[str, float]],
    keys: Sequence[str],
    *,
    ylabel: str,
    label: str,
    caption: str,
) -> Curve:
    """Scores in percent.

    Args:
        rows: values of an iteration by key.
        keys: of the scores to draw.
        ylabel: what they have in common.
        label, caption: as of :class:`Curve`.
    """
    figure, axes = _new_figure(ylabel)
    for index, key in enumerate(keys):
        x, y = series(rows, key)
        colour = _LINE_COLOURS[(index + 1) % len(_LINE_COLOURS)]
        axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=4.5, label=_label(key))
    axes.set_ylim(0, 100)
    return _curve(figure, label, caption)
