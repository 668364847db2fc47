"""Chooses the images of a gallery and reads their pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from contnet.config.keys import MAX_PIXELS
from contnet.data.pipeline.images import read_pixels
from contnet.report.page import Gallery, Notes, Section
from contnet.report.pictures import Box, ReportImage, shrink
from contnet.utils.errors import UserError
from contnet.utils.text import plural

__all__ = ["GallerySettings", "build_gallery", "choose_images", "with_pixels"]


@dataclass(frozen=True)
class GallerySettings:
    """Number and size of the images that are shown.

    Attributes:
        images: number of the worst images; a third as many of the best images follow.
        side: maximum width and height on the page, in pixels.
        max_pixels: INPUT.MAX_PIXELS.
    """

    images: int = 24
    side: int = 480
    max_pixels: int = MAX_PIXELS


def choose_images(
    errors: Mapping[object, float], size: Mapping[object, float], number: int
) -> tuple[list, list]:
    """Returns the worst images and a third as many of the best images.

    Args:
        errors: error of each image; 0 is best.
        size: decides between images without errors; the largest are chosen.
        number: number of the worst images.
    """
    worst = sorted((key for key in errors if errors[key]), key=lambda key: -errors[key])
    best = sorted((key for key in errors if not errors[key] and size[key]), key=lambda k: -size[k])
    return worst[:number], best[: -(-number // 3)]


def _scaled(view: Sequence[Box] | np.ndarray, scale: float, side: int) -> object:
    if isinstance(view, np.ndarray):
        return shrink(view, side)[0]
    return [replace(box, xyxy=tuple(scale * value for value in box.xyxy)) for box in view]


def with_pixels(image: ReportImage, pixels: np.ndarray, side: int) -> ReportImage:
    """Returns an image with its pixels and views, shrunk.

    Args:
        image: an image whose boxes are in pixels of the original image.
        pixels: uint8 RGB (H, W, 3).
        side: maximum width and height in pixels.
    """
    smaller, scale = shrink(pixels, side)
    views = {name: _scaled(view, scale, side) for name, view in image.views.items()}
    return replace(image, image=smaller, views=views)


def build_gallery(
    heading: str,
    images: Sequence[ReportImage],
    root: str,
    class_names: Sequence[str],
    note: str,
    settings: GallerySettings,
) -> Section:
    """Returns a gallery of images, which are read from disk.

    Args:
        heading: heading of the section.
        images: images without their pixels; their names are paths.
        root: folder that the names are relative to.
        class_names: class names of the boxes.
        note: text above the images; the number of unreadable images is added.
        settings: size of the images.
    """
    shown, unreadable = [], []
    for image in images:
        try:
            record = {"file_name": str(Path(root, image.name)), **image.place}
            pixels = read_pixels(record, "RGB", settings.max_pixels)
        except UserError as error:
            unreadable.append(str(error))
        else:
            shown.append(with_pixels(image, pixels, settings.side))
    if unreadable:
        note += f" {plural(len(unreadable), 'image')} cannot be shown: {unreadable[0]}"
    if not shown:
        return Notes(heading, [note if unreadable else "There are no images to show."])
    return Gallery(heading, class_names, shown, note)
