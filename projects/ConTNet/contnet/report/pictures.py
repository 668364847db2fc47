"""Images with boxes and labels, and where the page draws them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

from contnet.utils.text import printable

__all__ = [
    "Box",
    "LabelledBox",
    "Place",
    "ReportImage",
    "class_colour",
    "data_url",
    "label_boxes",
    "place_tag",
    "shrink",
]

# Light enough for black text, and far apart from each other in lightness or hue.
_CLASS_COLOURS = (
    "#ffb000", "#56b4e9", "#ff8fb8", "#3ddc97", "#c5a3ff", "#f0e442", "#ff7f5c", "#9fe8ff",
    "#b8c93a", "#e6b8a2",
)  # fmt: skip
_LETTER_WIDTH = 0.62  # width of a monospaced character, relative to the font size
_LONGEST_LABEL = 100  # characters
_QUALITY = 88  # JPEG quality


@dataclass(frozen=True)
class Box:
    """A box to draw.

    Attributes:
        xyxy: left, top, right and bottom edge in pixels of the image.
        class_index: index into the report's class names.
        score: the detector's confidence in 0..1; None for ground truth.
        wrong: whether it is a false detection or a missed object; drawn with a broken outline.
    """

    xyxy: Sequence[float]
    class_index: int
    score: float | None = None
    wrong: bool = False


@dataclass(frozen=True)
class ReportImage:
    """An image, shown once for each view.

    Attributes:
        name: name of the image on the page, e.g. its file name.
        image: uint8 RGB array of shape (H, W, 3).
        views: boxes to draw, by the view's name, e.g. ground truth and detections; or another
            array of the same kind to show instead of the image.
        note: text below the image.
        classes: names of classes for the filter.
        errors: kinds of errors for the filter.
        place: keys that locate the image within a file, to read its pixels.
    """

    name: str
    image: np.ndarray
    views: Mapping[str, Sequence[Box] | np.ndarray]
    note: str = ""
    classes: Sequence[str] = ()
    errors: Sequence[str] = ()
    place: Mapping[str, object] = field(default_factory=dict)


class Place(NamedTuple):
    """A rectangle in pixels of the image."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class LabelledBox:
    """A box as it is drawn.

    Attributes:
        xyxy: edges of the box.
        text: its class and score.
        colour: colour of its class.
        wrong: as in :class:`Box`.
        outline: rectangle of the box.
        tag: rectangle of the text's background.
        letter: font size in pixels of the image.
        text_width: width of the text in pixels of the image.
    """

    xyxy: tuple[float, float, float, float]
    text: str
    colour: str
    wrong: bool
    outline: Place
    tag: Place
    letter: float
    text_width: float


def shrink(image: np.ndarray, side: int) -> tuple[np.ndarray, float]:
    """Shrinks a uint8 RGB image to at most ``side`` pixels per side; also returns the scale."""
    scale = min(1.0, side / max(image.shape[:2]))
    if scale == 1:
        return image, scale
    size = [max(round(scale * length), 1) for length in image.shape[1::-1]]
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)), scale


def data_url(image: np.ndarray) -> str:
    """Returns a uint8 RGB image (H, W, 3) as a data URL of a JPEG."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def class_colour(index: int) -> str:
    """Returns the CSS colour of a class."""
    return _CLASS_COLOURS[index % len(_CLASS_COLOURS)]


def place_tag(
    box: Box, size: tuple[float, float], limits: tuple[int, int], taken: Sequence[Place]
) -> Place:
    """Places a box's label at the box, inside the image and over no other label if possible.

    Args:
        box: the box.
        size: width and height of the label.
        limits: width and height of the image.
        taken: places of the earlier labels.
    """
    (x0, y0, x1, y1), (width, height) = (float(v) for v in box.xyxy), size
    places = []
    for y in (y0 - height, y1, y0, y1 - height):
        for x in (x0, x1 - width):
            left, top = min(x, limits[0] - width), min(y, limits[1] - height)
            places.append(Place(max(left, 0.0), max(top, 0.0), width, height))

    def hidden(place: Place) -> float:
        overlaps = (
            max(min(place.x + width, other.x + other.width) - max(place.x, other.x), 0)
            * max(min(place.y + height, other.y + other.height) - max(place.y, other.y), 0)
            for other in taken
        )
        return sum(overlaps)

    return min(places, key=hidden)


def label_boxes(
    boxes: Sequence[Box], class_names: Sequence[str], width: int, height: int
) -> list[LabelledBox]:
    """Returns boxes with labels that avoid each other, in an image of this size in pixels."""
    letter = max(width, height) / 23
    labelled: list[LabelledBox] = []
    for box in boxes:
        x0, y0, x1, y1 = xyxy = tuple(float(v) for v in box.xyxy)
        text = printable(class_names[box.class_index], _LONGEST_LABEL)
        if box.score is not None:
            text += f" {box.score:.2f}"
        text_width = len(text) * _LETTER_WIDTH * letter
        size = (text_width + 0.5 * letter, 1.2 * letter)
        labelled.append(
            LabelledBox(
                xyxy=xyxy,
                text=text,
                colour=class_colour(box.class_index),
                wrong=box.wrong,
                outline=Place(x0, y0, x1 - x0, y1 - y0),
                tag=place_tag(box, size, (width, height), [each.tag for each in labelled]),
                letter=letter,
                text_width=text_width,
            )
        )
    return labelled
