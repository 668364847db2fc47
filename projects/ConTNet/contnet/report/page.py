"""A report: one self-contained HTML page of sections, made by the templates beside this file.

The page embeds all that it shows and forbids itself the network, so that it can be mailed, archived
or opened from a disk. It runs no script, follows the reader's light or dark mode, and fits a phone.
Sections are plain data, and know nothing of models or tasks; all text is escaped by Jinja. The same
input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from contnet.report.curves import Curve
from contnet.report.pictures import ReportImage, class_colour, data_url, label_boxes
from contnet.utils.files import atomic_write, writing
from contnet.utils.text import printable

__all__ = [
    "ContactSheet",
    "Curves",
    "Facts",
    "Gallery",
    "Section",
    "Thumbnail",
    "Tiles",
    "write_page",
]

_LONGEST_TEXT = 10_000


class Section:
    """A part of a page; its template finds it as ``section``."""

    template: ClassVar[str]


@dataclass(frozen=True)
class Tiles(Section):
    """A few numbers, large, by their names."""

    template = "tiles.html"

    numbers: Mapping[str, str]


@dataclass(frozen=True)
class Facts(Section):
    """A table of names and values."""

    template = "facts.html"

    heading: str
    facts: Mapping[str, object]


@dataclass(frozen=True)
class Curves(Section):
    """Curves and, as their equal in text, a table of values.

    Attributes:
        heading: of the section.
        curves: to show side by side.
        columns: the keys that the table has.
        rows: values of an iteration by key; those without any of the columns are left out.
    """

    template = "curves.html"

    heading: str
    curves: Sequence[Curve]
    columns: Sequence[str]
    rows: Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Gallery(Section):
    """Images with boxes, and a legend of the classes.

    Attributes:
        heading: of the section.
        class_names: names that ``Box.class_index`` points to.
        images: to show.

    Raises:
        ValueError: an image that is no uint8 (H, W, 3) array, or a box of an unknown class.
    """

    template = "gallery.html"

    heading: str
    class_names: Sequence[str]
    images: Sequence[ReportImage]

    def __post_init__(self):
        for item in self.images:
            array = item.image
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
                raise ValueError(
                    f"{item.name}: expected a uint8 image (H, W, 3), not {array.dtype} "
                    f"{array.shape}"
                )
            for box in (box for boxes in item.views.values() for box in boxes):
                if not 0 <= box.class_index < len(self.class_names):
                    raise ValueError(f"{item.name}: class {box.class_index} has no name")


@dataclass(frozen=True)
class Thumbnail:
    """A small picture that opens a file.

    Attributes:
        name: of the image.
        href: of the file, relative to the page.
        image: uint8 RGB array of shape (H, W, 3).
        caption: what there is to say of it.
    """

    name: str
    href: str
    image: np.ndarray
    caption: str


@dataclass(frozen=True)
class ContactSheet(Section):
    """Small pictures, each of which opens a file beside the page."""

    template = "contact_sheet.html"

    heading: str
    thumbnails: Sequence[Thumbnail]


def _short(value: object) -> str:
    """A value of a table, with few digits."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10 else f"{value:.2f}"
    return str(value)


def _shown(value: object) -> object:
    """What the page shows of a value: a text in one line, cut if it is very long."""
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
        class_colour=class_colour, data_url=data_url, label_boxes=label_boxes
    )
    return environment


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Writes a report as one HTML page.

    Args:
        path: the page's file; its folder is made, an older page is replaced in one step.
        title: heading of the page.
        sections: in their order on the page.

    Returns:
        The path that was written.
    """
    page = _environment().get_template("page.html").render(title=title, sections=sections)
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(page.encode())
    return path
