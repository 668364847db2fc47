"""Pictures with boxes, as SVG in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

__all__ = ["CLASS_COLOURS", "Box", "ReportImage", "draw_pair", "place_tag"]

# Light enough for black text on top, and far apart from each other in lightness or hue.
CLASS_COLOURS = (
    "#ffb000", "#56b4e9", "#ff8fb8", "#3ddc97", "#c5a3ff", "#f0e442", "#ff7f5c", "#9fe8ff",
    "#b8c93a", "#e6b8a2",
)  # fmt: skip
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


def _data_url(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _caption(box: Box, class_names: Sequence[str]) -> str:
    name = class_names[box.class_index]
    return name if box.score is None else f"{name} {box.score:.2f}"


def place_tag(
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
        colour = CLASS_COLOURS[box.class_index % len(CLASS_COLOURS)]
        place = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
        outlines.append(
            f'<g class="box"><title>{escape(text)} at {x0:.0f}, {y0:.0f}, {x1:.0f}, {y1:.0f}'
            f'</title><rect {place} class="halo"/><rect {place} stroke="{colour}"/></g>'
        )
        length = len(text) * _LETTER_WIDTH * size
        tag_width, tag_height = length + 0.5 * size, 1.2 * size
        left, top = place_tag(box, (tag_width, tag_height), (width, height), taken)
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


def draw_pair(index: int, item: ReportImage, class_names: Sequence[str]) -> str:
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
