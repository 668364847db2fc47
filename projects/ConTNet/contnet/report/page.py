"""A run's report: one self-contained HTML page of its numbers, curves and pictures.

The page embeds all that it shows and forbids itself the network, so that it can be mailed, archived
or opened from a disk. It runs no script, follows the reader's light or dark mode, and fits a phone.
It is made from plain data and knows nothing of models or data sets; the same input gives the same
bytes.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from contnet.report.curves import (
    ap_curve,
    by_iteration,
    format_number,
    loss_curve,
    series,
    shown_columns,
)
from contnet.report.pictures import CLASS_COLOURS, ReportImage, draw_pair
from contnet.utils.files import atomic_write

__all__ = ["write_report"]


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
        _, values = series(rows, key)
        if values:
            shown = f"{values[-1]:.3f}" if key == "total_loss" else f"{values[-1]:.1f}"
            tiles.append(f'<div class="tile"><dt>{label}</dt><dd>{shown}</dd></div>')
    return f'<dl class="tiles">{"".join(tiles)}</dl>\n' if tiles else ""


def _summary_table(summary: Mapping[str, object]) -> str:
    lines = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(format_number(value))}</td></tr>\n'
        for key, value in summary.items()
    )
    return f'<div class="card"><table class="summary"><tbody>\n{lines}</tbody></table></div>\n'


def _class_table(rows: Mapping[int, Mapping[str, float]], class_names: Sequence[str]) -> str:
    """AP of each class at the last evaluation that knew it."""
    lines = []
    for name in class_names:
        _, values = series(rows, f"bbox/AP-{name}")
        if values:
            value = format_number(values[-1])
            lines.append(f'<tr><th scope="row">{escape(name)}</th><td>{value}</td></tr>\n')
    if not lines:
        return ""
    return (
        '<h2>Box AP by class</h2>\n<div class="card"><table class="summary"><tbody>\n'
        + "".join(lines)
        + "</tbody></table></div>\n"
    )


def _curves(rows: Mapping[int, Mapping[str, float]]) -> str:
    """The curves and, as their equal in text, the table of all their values."""
    columns = shown_columns(rows)
    if not columns:
        return ""
    figures = []
    if any(not key.startswith(("bbox", "segm")) for key in columns):
        figures.append((loss_curve(rows), "Losses; lines are running medians."))
    if any(key.startswith(("bbox", "segm")) for key in columns):
        figures.append((ap_curve(rows), "Average precision on the validation images."))
    drawn = "".join(
        f'<figure class="card">{svg}<figcaption>{caption}</figcaption></figure>\n'
        for svg, caption in figures
    )
    head = "".join(f'<th scope="col">{escape(key)}</th>' for key in ("iteration", *columns))
    body = "".join(
        f'<tr><th scope="row">{iteration}</th>'
        + "".join(f"<td>{format_number(row[key]) if key in row else ''}</td>" for key in columns)
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
        f'<li style="background:{CLASS_COLOURS[i % len(CLASS_COLOURS)]}">{escape(name)}</li>'
        for i, name in enumerate(class_names)
    )
    pairs = "".join(draw_pair(index, item, class_names) for index, item in enumerate(images))
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
    rows = by_iteration(metrics)
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
