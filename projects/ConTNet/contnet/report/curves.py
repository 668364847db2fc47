"""Interactive curves: Bokeh's figures as JSON, which the page draws without a server."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from contnet.utils.text import printable

if TYPE_CHECKING:  # importing bokeh takes a second
    from bokeh.models import ColumnDataSource
    from bokeh.plotting import figure as Figure

__all__ = [
    "Line",
    "Plot",
    "bokeh_script",
    "by_iteration",
    "line_colour",
    "plot_json",
    "running_median",
    "series",
]

# Mid-tones that stand out from white and from black.
_COLOURS = ("#d1680b", "#2a86c8", "#1a9a6c", "#c14e9c", "#8b6fd6", "#a08a12", "#d64545", "#5f7f8f")
_DASHES = ("solid", "dashed", "dotted", "dotdash")
_LONGEST_LABEL = 60  # characters
_HEIGHT = 300  # pixels
_MARKED = 50  # lines with at most this many points also have markers
_TOOLS = "box_zoom,wheel_zoom,pan,reset,save"


@dataclass(frozen=True)
class Line:
    """A line of a plot.

    Attributes:
        label: its name in the legend.
        x, y: coordinates of the points; points that are not finite are left out.
        shown: whether it is visible at first.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    shown: bool = True


@dataclass(frozen=True)
class Plot:
    """Lines that share an x-axis.

    Attributes:
        title: title of the plot.
        x_label, y_label: labels of the axes.
        lines: lines to draw.
        caption: text below the plot.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    caption: str = ""


def by_iteration(metrics: Iterable[Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Merges the lines of each iteration; a later line replaces the value of a key."""
    merged: dict[int, dict[str, float]] = {}
    for line in metrics:
        values = {key: value for key, value in line.items() if key != "iteration"}
        merged.setdefault(int(line["iteration"]), {}).update(values)
    return dict(sorted(merged.items()))


def series(rows: Mapping[int, Mapping[str, float]], key: str) -> tuple[list[int], list[float]]:
    """Returns the iterations and values of one key, where the value is finite."""
    points = [(i, row[key]) for i, row in rows.items() if math.isfinite(row.get(key, math.nan))]
    return [i for i, _ in points], [value for _, value in points]


def running_median(values: list[float]) -> list[float]:
    """Returns the median over a centred window of about a twentieth of the series."""
    reach = len(values) // 40
    return [
        statistics.median(values[max(i - reach, 0) : i + reach + 1]) for i in range(len(values))
    ]


def line_colour(index: int) -> str:
    """Returns the CSS colour of a plot's line."""
    return _COLOURS[index % len(_COLOURS)]


@lru_cache(maxsize=1)
def bokeh_script() -> str:
    """Returns Bokeh's JavaScript library."""
    from bokeh.resources import Resources

    return Resources(mode="inline", components=["bokeh"]).js_raw[0]


def _source(line: Line, most: int) -> ColumnDataSource:
    """Returns a line's finite points; if there are more than ``most``, evenly spaced ones."""
    from bokeh.models import ColumnDataSource

    x, y = (np.asarray(values, dtype=float) for values in (line.x, line.y))
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) > most:
        kept = np.linspace(0, len(x) - 1, most).round().astype(int)
        x, y = x[kept], y[kept]
    return ColumnDataSource({"x": x.astype(np.float32), "y": y.astype(np.float32)})


def _figure(plot: Plot, sources: Sequence[ColumnDataSource], scale: str) -> Figure:
    from bokeh.models import DataRange1d, HoverTool
    from bokeh.plotting import figure

    drawn = figure(
        height=_HEIGHT,
        sizing_mode="stretch_width",
        x_axis_label=plot.x_label,
        y_axis_label=printable(plot.y_label, _LONGEST_LABEL),
        y_axis_type=scale,
        x_range=DataRange1d(only_visible=True),
        y_range=DataRange1d(only_visible=True),
        tools=_TOOLS,
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_alpha=0,
    )
    drawn.toolbar.logo = None
    hovered = []
    for index, (line, source) in enumerate(zip(plot.lines, sources, strict=True)):
        look = {
            "source": source,
            "color": line_colour(index),
            "visible": line.shown,
            "name": printable(line.label, _LONGEST_LABEL),
        }
        dash = _DASHES[index // len(_COLOURS) % len(_DASHES)]
        renderers = [drawn.line("x", "y", line_width=2, line_dash=dash, **look)]
        if len(source.data["x"]) <= _MARKED:
            renderers.append(drawn.scatter("x", "y", size=6, **look))
        for renderer in renderers:
            renderer.tags = [index]
        hovered.append(renderers[-1])
    tips = [("", "$name"), (plot.x_label, "@x{0.[000]}"), (plot.y_label, "@y{0.[00000]}")]
    drawn.add_tools(HoverTool(renderers=hovered, tooltips=tips, line_policy="nearest"))
    return drawn


def plot_json(plot: Plot, most: int = 1000) -> str:
    """Returns a plot as JSON for ``Bokeh.embed.embed_item``.

    The root is a column with a figure whose y-axis is linear; the column's tag is a figure of the
    same data with a logarithmic y-axis. The tag of a line is its number.

    Args:
        plot: the plot.
        most: maximum number of points of a line; if it has more, evenly spaced ones are kept.

    Returns:
        Text that is safe in an HTML script element.
    """
    from bokeh.embed import json_item
    from bokeh.layouts import column

    sources = [_source(line, most) for line in plot.lines]
    linear, log = (_figure(plot, sources, scale) for scale in ("linear", "log"))
    item = json_item(column(linear, sizing_mode="stretch_width", tags=[log]))
    return json.dumps(item, separators=(",", ":")).replace("<", "\\u003c")
