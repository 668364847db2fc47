"""A run's report: one self-contained HTML page of its numbers, curves and pictures.

The page embeds all that it shows and forbids itself the network, so that it can be mailed, archived
or opened from a disk. It runs no script, follows the reader's light or dark mode, and fits a phone.
It is made from plain data and knows nothing of models or data sets; the same input gives the same
bytes.
"""

import base64
import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from contnet.utils.files import atomic_write

__all__ = ["Box", "ReportImage", "write_report"]

# Light enough for black text on top, and far apart from each other in lightness or hue.
_CLASS_COLOURS = (
    "#ffb000", "#56b4e9", "#ff8fb8", "#3ddc97", "#c5a3ff", "#f0e442", "#ff7f5c", "#9fe8ff",
    "#b8c93a", "#e6b8a2",
)  # fmt: skip
# Mid-tones that stand out from white and from black.
_LINE_COLOURS = ("#d1680b", "#2a86c8", "#1a9a6c", "#c14e9c", "#8b6fd6", "#a08a12", "#d64545")
_SENTINEL = "#010203"  # Stands for the text colour in matplotlib's SVG.
_LETTER_WIDTH = 0.62  # Of a monospaced letter, against its size.


@dataclass(frozen=True)
class Box:
    """A box to draw.

    Attributes:
        xyxy: left, top, right and bottom edge in pixels of the image.
        class_index: index into the report's class names.
        score: the detector's confidence in 0..1; None for ground truth.
    """

    xyxy: Sequence[float]
    class_index: int
    score: float | None = None


@dataclass(frozen=True)
class ReportImage:
    """An image with its true boxes and the boxes that were found.

    Attributes:
        name: what the page calls the image, e.g. its file name.
        image: uint8 RGB array of shape (H, W, 3).
        ground_truth: the true boxes.
        detections: the detector's boxes; give only those that should be seen.
    """

    name: str
    image: np.ndarray
    ground_truth: Sequence[Box]
    detections: Sequence[Box]


# ---------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------


def _by_iteration(metrics: Iterable[Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Merges the lines of one iteration; of two values of one key, the later line's holds."""
    merged: dict[int, dict[str, float]] = {}
    for line in metrics:
        values = {key: value for key, value in line.items() if key != "iteration"}
        merged.setdefault(int(line["iteration"]), {}).update(values)
    return dict(sorted(merged.items()))


def _series(rows: Mapping[int, Mapping[str, float]], key: str) -> tuple[list[int], list[float]]:
    """The finite values of one key, as iterations and values."""
    points = [(i, row[key]) for i, row in rows.items() if math.isfinite(row.get(key, math.nan))]
    return [i for i, _ in points], [value for _, value in points]


def _columns(rows: Mapping[int, Mapping[str, float]]) -> list[str]:
    """The keys that the page shows, in its order: losses, then AP over all classes."""
    keys = {key for row in rows.values() for key in row}
    losses = sorted(key for key in keys if key.startswith("loss_"))
    scores = sorted(key for key in keys if re.fullmatch(r"(bbox|segm)/AP[0-9a-z]*", key))
    return [key for key in ("total_loss",) if key in keys] + losses + scores


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10 else f"{value:.2f}"
    return str(value)


def _running_median(values: list[float]) -> list[float]:
    """The median over a centred window of about a twentieth of the series."""
    reach = len(values) // 40
    return [
        statistics.median(values[max(i - reach, 0) : i + reach + 1]) for i in range(len(values))
    ]


# ---------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------


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


def _loss_curve(rows: Mapping[int, Mapping[str, float]]) -> str:
    """All losses: their running medians, and faintly each value of the total."""
    figure, axes = _new_figure("loss")
    keys = [key for key in _columns(rows) if key.startswith(("total_loss", "loss_"))]
    for index, key in enumerate(keys):
        x, y = _series(rows, key)
        colour = _LINE_COLOURS[index % len(_LINE_COLOURS)]
        if key == "total_loss":
            axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
        width = 2.2 if key == "total_loss" else 1.2
        marker = "o" if len(x) == 1 else None
        axes.plot(x, _running_median(y), color=colour, linewidth=width, marker=marker, label=key)
    axes.set_ylim(bottom=0)
    return _svg(figure, "Loss against iteration")


def _ap_curve(rows: Mapping[int, Mapping[str, float]]) -> str:
    figure, axes = _new_figure("AP")
    keys = [key for key in _columns(rows) if re.fullmatch(r"(bbox|segm)/AP(50|75)?", key)]
    for index, key in enumerate(keys):
        x, y = _series(rows, key)
        colour = _LINE_COLOURS[(index + 1) % len(_LINE_COLOURS)]
        axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=4.5, label=key)
    axes.set_ylim(0, 100)
    return _svg(figure, "Average precision against iteration")


# ---------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------


def _data_url(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _caption(box: Box, class_names: Sequence[str]) -> str:
    name = class_names[box.class_index]
    return name if box.score is None else f"{name} {box.score:.2f}"


def _place_tag(
    box: Box, size: tuple[float, float], limits: tuple[int, int], taken: list[tuple[float, ...]]
) -> tuple[float, float]:
    """The left top corner of a box's label: at the box, in the image, over no label if possible."""
    (x0, y0, x1, y1), (width, height) = (float(v) for v in box.xyxy), size
    places = []
    for y in (y0 - height, y1, y0, y1 - height):
        for x in (x0, x1 - width):
            left, top = min(x, limits[0] - width), min(y, limits[1] - height)
            places.append((max(left, 0.0), max(top, 0.0)))

    def hidden(place: tuple[float, float]) -> float:
        overlaps = (
            max(min(place[0] + width, right) - max(place[0], left), 0)
            * max(min(place[1] + height, bottom) - max(place[1], top), 0)
            for left, top, right, bottom in taken
        )
        return sum(overlaps)

    return min(places, key=hidden)


def _drawn_boxes(boxes: Sequence[Box], names: Sequence[str], width: int, height: int) -> str:
    """Boxes and, above them all, their labels, in units of the image's pixels."""
    size = max(width, height) / 23
    outlines, tags = [], []
    taken: list[tuple[float, ...]] = []
    for box in boxes:
        x0, y0, x1, y1 = (float(v) for v in box.xyxy)
        text = _caption(box, names)
        colour = _CLASS_COLOURS[box.class_index % len(_CLASS_COLOURS)]
        place = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
        outlines.append(
            f'<g class="box"><title>{escape(text)} at {x0:.0f}, {y0:.0f}, {x1:.0f}, {y1:.0f}'
            f'</title><rect {place} class="halo"/><rect {place} stroke="{colour}"/></g>'
        )
        length = len(text) * _LETTER_WIDTH * size
        tag_width, tag_height = length + 0.5 * size, 1.2 * size
        left, top = _place_tag(box, (tag_width, tag_height), (width, height), taken)
        taken.append((left, top, left + tag_width, top + tag_height))
        tags.append(
            f'<g class="tag"><rect x="{left:.1f}" y="{top:.1f}" width="{tag_width:.1f}" '
            f'height="{tag_height:.1f}" rx="{0.15 * size:.1f}" fill="{colour}"/>'
            f'<text x="{left + 0.25 * size:.1f}" y="{top + 0.93 * size:.1f}" '
            f'font-size="{size:.1f}" textLength="{length:.1f}" '
            f'lengthAdjust="spacingAndGlyphs">{escape(text)}</text></g>'
        )
    return "".join(outlines + tags)


def _picture(
    content: str, kind: str, item: ReportImage, boxes: Sequence[Box], names: Sequence[str]
) -> str:
    """One image with boxes and the caption that says what they are."""
    height, width = item.image.shape[:2]
    listed = ", ".join(_caption(box, names) for box in boxes) or "none"
    drawn = _drawn_boxes(boxes, names, width, height)
    count = "1 box" if len(boxes) == 1 else f"{len(boxes)} boxes"
    return (
        f'<figure><svg class="picture" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{kind} of {escape(item.name)}: {escape(listed)}">{content}{drawn}</svg>'
        f"<figcaption>{kind}: {count}</figcaption></figure>"
    )


def _pair(index: int, item: ReportImage, class_names: Sequence[str]) -> str:
    """Ground truth and detections of one image, side by side."""
    height, width = item.image.shape[:2]
    content = (
        f'<image id="image-{index}" width="{width}" height="{height}" '
        f'href="{_data_url(item.image)}"/>'
    )
    again = f'<use href="#image-{index}"/>'
    return (
        f'<section class="pair" aria-label="{escape(item.name)}"><h3>{escape(item.name)}</h3>'
        f'<div class="sides">'
        + _picture(content, "Ground truth", item, item.ground_truth, class_names)
        + _picture(again, "Detections", item, item.detections, class_names)
        + "</div></section>\n"
    )


# ---------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --back: #f6f6f3; --card: #fff; --text: #1c1d21; --soft: #5b5e66;
  --line: #dcdcd6; --accent: #a84f00; }
@media (prefers-color-scheme: dark) { :root { --back: #131418; --card: #1d1f25; --text: #ececf0;
  --soft: #a9adb8; --line: #353842; --accent: #ffb26b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; background: var(--back);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 1rem; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 2.2rem 0 .7rem; font-size: 1.2rem; }
h3 { margin: 0 0 .5rem; font: 600 .85rem ui-monospace, monospace; color: var(--soft); }
.card, .pair, .tile { background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 0; }
.tile { flex: 1 1 7rem; padding: .7rem 1rem; }
.tile dt { color: var(--soft); font-size: .85rem; }
.tile dd { margin: 0; font-size: 1.7rem; font-weight: 650; line-height: 1.2; }
.tile:first-child dd { color: var(--accent); }
.card { padding: .8rem 1rem; }
.scroll { overflow: auto; max-height: 26rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top;
  border-top: 1px solid var(--line); }
tr:first-child > * { border-top: 0; }
th { font-weight: 600; }
.summary th { width: 11rem; min-width: 7rem; color: var(--soft); font-weight: 500; }
.numbers { font-variant-numeric: tabular-nums; white-space: nowrap; }
.numbers th, .numbers td { text-align: right; }
.curves, .pairs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit,
  minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; }
.curves svg { display: block; width: 100%; height: auto; font-family: system-ui, sans-serif; }
figcaption { margin-top: .3rem; color: var(--soft); font-size: .88rem; }
.pair { padding: .8rem; }
.sides { display: grid; gap: .7rem; align-items: end;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.picture { display: block; width: 100%; height: auto; border-radius: .3rem; }
.box rect { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
.box .halo { stroke: #000; stroke-width: 4; stroke-opacity: .65; }
.tag text { fill: #000; font-family: ui-monospace, monospace; font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem .5rem; margin: 0 0 1rem; padding: 0;
  list-style: none; }
.legend li { padding: .05rem .6rem; border-radius: 1rem; color: #000; font-size: .85rem; }
summary { cursor: pointer; padding: .2rem 0; }
@media print { .scroll { max-height: none; } .pair { break-inside: avoid; } }
"""


def _tiles(rows: Mapping[int, Mapping[str, float]]) -> str:
    """The last box AP, AP50 and total loss, large."""
    tiles = []
    for key, label in (
        ("bbox/AP", "box AP"),
        ("bbox/AP50", "box AP50"),
        ("bbox/AP75", "box AP75"),
        ("total_loss", "last loss"),
    ):
        _, values = _series(rows, key)
        if values:
            shown = f"{values[-1]:.3f}" if key == "total_loss" else f"{values[-1]:.1f}"
            tiles.append(f'<div class="tile"><dt>{label}</dt><dd>{shown}</dd></div>')
    return f'<dl class="tiles">{"".join(tiles)}</dl>\n' if tiles else ""


def _summary_table(summary: Mapping[str, object]) -> str:
    lines = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(_number(value))}</td></tr>\n'
        for key, value in summary.items()
    )
    return f'<div class="card"><table class="summary"><tbody>\n{lines}</tbody></table></div>\n'


def _class_table(rows: Mapping[int, Mapping[str, float]], class_names: Sequence[str]) -> str:
    """AP of each class at the last evaluation that knew it."""
    lines = []
    for name in class_names:
        _, values = _series(rows, f"bbox/AP-{name}")
        if values:
            lines.append(
                f'<tr><th scope="row">{escape(name)}</th><td>{_number(values[-1])}</td></tr>\n'
            )
    if not lines:
        return ""
    return (
        '<h2>Box AP by class</h2>\n<div class="card"><table class="summary"><tbody>\n'
        + "".join(lines)
        + "</tbody></table></div>\n"
    )


def _curves(rows: Mapping[int, Mapping[str, float]]) -> str:
    """The curves and, as their equal in text, the table of all their values."""
    columns = _columns(rows)
    if not columns:
        return ""
    figures = []
    if any(not key.startswith(("bbox", "segm")) for key in columns):
        figures.append((_loss_curve(rows), "Losses; lines are running medians."))
    if any(key.startswith(("bbox", "segm")) for key in columns):
        figures.append((_ap_curve(rows), "Average precision on the validation images."))
    drawn = "".join(
        f'<figure class="card">{svg}<figcaption>{caption}</figcaption></figure>\n'
        for svg, caption in figures
    )
    head = "".join(f'<th scope="col">{escape(key)}</th>' for key in ("iteration", *columns))
    body = "".join(
        f'<tr><th scope="row">{iteration}</th>'
        + "".join(f"<td>{_number(row[key]) if key in row else ''}</td>" for key in columns)
        + "</tr>\n"
        for iteration, row in rows.items()
        if any(key in row for key in columns)
    )
    return (
        f'<h2>Curves</h2>\n<div class="curves">\n{drawn}</div>\n'
        "<details><summary>The numbers behind the curves</summary>\n"
        '<div class="card scroll" tabindex="0" role="region" aria-label="Numbers">'
        f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>'
        "</div></details>\n"
    )


def _pictures(images: Sequence[ReportImage], class_names: Sequence[str]) -> str:
    if not images:
        return ""
    legend = "".join(
        f'<li style="background:{_CLASS_COLOURS[i % len(_CLASS_COLOURS)]}">{escape(name)}</li>'
        for i, name in enumerate(class_names)
    )
    pairs = "".join(_pair(index, item, class_names) for index, item in enumerate(images))
    return (
        "<h2>Detections beside ground truth</h2>\n"
        f'<ul class="legend" aria-label="Classes">{legend}</ul>\n'
        f'<div class="pairs">\n{pairs}</div>\n'
    )


def _check(images: Sequence[ReportImage], class_names: Sequence[str]) -> None:
    for item in images:
        array = item.image
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(
                f"{item.name}: expected a uint8 image (H, W, 3), not {array.dtype} {array.shape}"
            )
        for box in (*item.ground_truth, *item.detections):
            if not 0 <= box.class_index < len(class_names):
                raise ValueError(f"{item.name}: class {box.class_index} has no name")


def write_report(
    path: str | Path,
    *,
    title: str,
    images: Sequence[ReportImage],
    metrics: Sequence[Mapping[str, float]],
    summary: Mapping[str, object],
    class_names: Sequence[str],
) -> Path:
    """Writes the report of a run as one HTML page.

    Args:
        path: the page's file; its folder is made, an older page is replaced in one step.
        title: heading of the page.
        images: images to show with their boxes; the page has a section less if empty.
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
    _check(images, class_names)
    rows = _by_iteration(metrics)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n"
        + _tiles(rows)
        + "<h2>The run</h2>\n"
        + _summary_table(summary)
        + _curves(rows)
        + _class_table(rows, class_names)
        + _pictures(images, class_names)
        + "</main>\n</body>\n</html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(page.encode())
    return path
