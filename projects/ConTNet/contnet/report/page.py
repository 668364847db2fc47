"""A report: one self-contained HTML page of sections, made by the templates beside this file.

The page embeds everything that it shows and blocks all network access, so it can be mailed,
archived or opened from a disk. It allows only its own scripts, by their hashes; without JavaScript
it still shows all tables and pictures. It follows the reader's light or dark mode and fits a phone.
Sections are plain data and independent of models and tasks; Jinja escapes all text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from contnet.report.curves import Plot, bokeh_script, line_colour, plot_json
from contnet.report.pictures import ReportImage, class_colour, data_url, label_boxes
from contnet.utils.files import NO_GUARD, WriteGuard, atomic_write, writing
from contnet.utils.text import printable

__all__ = [
    "Bars",
    "ContactSheet",
    "Curves",
    "Facts",
    "Gallery",
    "Matrix",
    "Notes",
    "Section",
    "Table",
    "Thumbnail",
    "Tiles",
    "write_page",
]

_LONGEST_TEXT = 10_000


class Section:
    """A part of a page, called ``section`` in its template."""

    template: ClassVar[str]


@dataclass(frozen=True)
class Tiles(Section):
    """A few numbers in large print, by name."""

    template = "tiles.html"

    numbers: Mapping[str, str]


@dataclass(frozen=True)
class Facts(Section):
    """A table of names and values."""

    template = "facts.html"

    heading: str
    facts: Mapping[str, object]


@dataclass(frozen=True)
class Notes(Section):
    """Paragraphs of text."""

    template = "notes.html"

    heading: str
    notes: Sequence[str]


@dataclass(frozen=True)
class Table(Section):
    """A table.

    Attributes:
        heading: heading of the section.
        columns: headings of the columns; the first one is for the names of rows.
        rows: names and cells of the rows; None is an empty cell.
        note: text above the table.
        folded: whether the table is closed at first.
    """

    template = "table.html"

    heading: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[object]]]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Bars(Section):
    """Charts of counts, side by side.

    Attributes:
        heading: heading of the section.
        charts: names and counts by title; each chart has at least one.
    """

    template = "bars.html"

    heading: str
    charts: Mapping[str, Sequence[tuple[str, int]]]


@dataclass(frozen=True)
class Matrix(Section):
    """Counts of pairs, shaded by their share of the row.

    Attributes:
        heading: heading of the section.
        corner: text of the corner cell, which says what rows and columns are.
        rows, columns: names of rows and columns.
        counts: (R, C).
        note: text above the matrix.
    """

    template = "matrix.html"

    heading: str
    corner: str
    rows: Sequence[str]
    columns: Sequence[str]
    counts: np.ndarray
    note: str = ""

    @property
    def shares(self) -> np.ndarray:
        """Shares of the rows' sums, (R, C); 0 in rows of zeros."""
        return self.counts / self.counts.sum(axis=1, keepdims=True).clip(1)


@dataclass(frozen=True)
class Curves(Section):
    """Plots, and a table of their values.

    Attributes:
        heading: heading of the section.
        plots: plots, shown side by side.
        columns: the name of the first column, then the keys of the table.
        rows: positions on the x-axis and their values by key; rows without any of the keys are
            left out.
        most: maximum number of points of a line.
    """

    template = "curves.html"

    heading: str
    plots: Sequence[Plot]
    columns: Sequence[str]
    rows: Sequence[tuple[object, Mapping[str, float]]]
    most: int = 1000


@dataclass(frozen=True)
class Gallery(Section):
    """Images with boxes, a legend of the classes, and filters by class and kind of error.

    Attributes:
        heading: heading of the section.
        class_names: names for ``Box.class_index``; the legend has only classes with a box.
        images: images to show.
        note: text above the images.

    Raises:
        ValueError: if an image is not a uint8 (H, W, 3) array, or a box has an unknown class.
    """

    template = "gallery.html"

    heading: str
    class_names: Sequence[str]
    images: Sequence[ReportImage]
    note: str = ""

    def __post_init__(self):
        for item in self.images:
            _check_image(item.name, item.image)
            for view in item.views.values():
                if isinstance(view, np.ndarray):
                    _check_image(item.name, view)
            for index in _box_classes(item):
                if not 0 <= index < len(self.class_names):
                    raise ValueError(f"{item.name}: class {index} has no name")

    @property
    def legend(self) -> list[tuple[int, str]]:
        """Indices and names of the classes that have a box."""
        drawn = sorted({index for item in self.images for index in _box_classes(item)})
        return [(index, self.class_names[index]) for index in drawn]

    @property
    def narrow(self) -> bool:
        """Whether every image has fewer than two views."""
        return all(len(item.views) < 2 for item in self.images)

    @cached_property
    def classes(self) -> list[str]:
        """Class names for the filter."""
        return sorted({name for item in self.images for name in item.classes})

    @cached_property
    def errors(self) -> list[str]:
        """Kinds of errors for the filter."""
        return list(dict.fromkeys(kind for item in self.images for kind in item.errors))


def _check_image(name: str, array: np.ndarray) -> None:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"{name}: expected a uint8 image (H, W, 3), not {array.dtype} {array.shape}"
        )


def _box_classes(image: ReportImage) -> list[int]:
    views = [view for view in image.views.values() if not isinstance(view, np.ndarray)]
    return [box.class_index for view in views for box in view]


@dataclass(frozen=True)
class Thumbnail:
    """A small picture that links to a file.

    Attributes:
        name: name of the image.
        href: path of the file, relative to the page.
        image: uint8 RGB array of shape (H, W, 3).
        caption: text below the picture.
    """

    name: str
    href: str
    image: np.ndarray
    caption: str


@dataclass(frozen=True)
class ContactSheet(Section):
    """Small pictures that link to files beside the page."""

    template = "contact_sheet.html"

    heading: str
    thumbnails: Sequence[Thumbnail]


def _short(value: object) -> str:
    """Returns a value as text with few digits."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10 else f"{value:.2f}"
    return "" if value is None else str(value)


def _shown(value: object) -> object:
    """Returns a value as the page shows it: text in one line, cut off if it is very long."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value, _LONGEST_TEXT)
    return value


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("contnet.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
    )
    environment.filters["short"] = _short
    environment.globals.update(
        class_colour=class_colour,
        data_url=data_url,
        is_array=lambda value: isinstance(value, np.ndarray),
        label_boxes=label_boxes,
        line_colour=line_colour,
        plot_json=plot_json,
    )
    return environment


def _script_hash(script: str) -> str:
    """Returns the hash of a script for a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _scripts(sections: Sequence[Section]) -> list[str]:
    """Returns the scripts that the sections need, in the page's order."""
    plots = any(isinstance(section, Curves) and section.plots for section in sections)
    own = plots or any(isinstance(section, Gallery) for section in sections)
    page = files("contnet.report").joinpath("templates", "page.js").read_text("utf-8")
    return [bokeh_script()] * plots + [page] * own


def write_page(
    path: str | Path, title: str, sections: Sequence[Section], guard: WriteGuard = NO_GUARD
) -> Path:
    """Writes a report as one HTML page.

    Args:
        path: the page's file; its folder is created, and an older page is replaced in one step.
        title: heading of the page.
        sections: sections in the page's order.
        guard: see :func:`contnet.utils.files.atomic_write`.

    Returns:
        The path that was written.
    """
    # Scripts are not escaped, because HTML does not unescape them; they contain no closing tag.
    scripts = _scripts(sections)
    page = (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            sections=sections,
            scripts=[Markup(script) for script in scripts],
            allowed=" ".join(map(_script_hash, scripts)) or "'none'",
        )
    )
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, guard=guard) as file:
        file.write(page.encode())
    return path
