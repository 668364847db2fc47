"""What can be wrong with image files: damaged, too deep, turned, of another size."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import NamedTuple

from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from PIL import Image

from contnet.data.datasets.coco import read_instances
from contnet.data.datasets.shards import sample_name
from contnet.data.findings import ERROR, FACT, NOTE, Finding
from contnet.data.pipeline.images import EXIF_ORIENTATION, decode, decode_error
from contnet.utils.errors import UserError

__all__ = [
    "ListedImage",
    "check_depth",
    "find_listed",
    "inspect_image",
    "inspect_listed",
]

_MODES = {"L": "grey", "P": "palette", "CMYK": "CMYK"}
_EXIF_TURNED = range(5, 9)  # width and height change places
# Pillow's modes of one channel of 16 or 32 bits.
_DEEP = ("I", "F")


def check_depth(image: Image.Image, path: str | Path) -> list[Finding]:
    """An error for an image whose values end at 255 when it is read as RGB."""
    if not image.mode.startswith(_DEEP):
        return []
    what = (
        "images of more than 8 bits, whose values are cut at 255 when they are read: save them "
        "with 8 bits"
    )
    return [Finding(ERROR, what, str(path))]


def inspect_image(record: dict) -> list[Finding]:
    """Decodes an image for the doctor: errors, Pillow's warnings, and facts to be counted."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            _, mode, turned = decode(record)
        except UserError as error:
            place = f"{sample_name(record)} ({decode_error(error.__cause__)})"
            return [Finding(ERROR, "images that cannot be read", place)]
    what = "images that Pillow warns about, and reads"
    found = [Finding(NOTE, what, f"{sample_name(record)} ({each.message})") for each in said]
    if mode != "RGB":
        found.append(Finding(FACT, f"stored as {_MODES.get(mode, mode)}"))
    if turned:
        found.append(Finding(FACT, "turned as EXIF says"))
    return found


class ListedImage(NamedTuple):
    """An image as an annotation file has it."""

    path: str
    width: object
    height: object


def inspect_listed(image: ListedImage, mode: str) -> list[Finding]:
    """Decodes an image as training does; what is wrong with it."""
    try:
        # Detectron2 turns an image as its EXIF says.
        height, width = read_image(image.path, mode).shape[:2]
        with Image.open(image.path) as file:
            orientation = file.getexif().get(EXIF_ORIENTATION, 1)
            found = check_depth(file, image.path)
    except Exception as error:  # decoders raise anything on a damaged file
        return [Finding(ERROR, "images that cannot be read", f"{image.path} ({error})")]
    sizes = f"{image.path} ({width}x{height}, annotations {image.width}x{image.height})"
    if (width, height) != (image.width, image.height):
        what = "images of another size than their annotations say"
        if orientation in _EXIF_TURNED and (height, width) == (image.width, image.height):
            what = (
                "images that their EXIF orientation turns when they are read, their annotations "
                "are for the unturned ones: save the images without it"
            )
        return [*found, Finding(ERROR, what, sizes)]
    if orientation != 1:
        what = (
            "images that their EXIF orientation turns when they are read: annotations must be for "
            "the turned ones"
        )
        found.append(Finding(NOTE, what, image.path))
    return found


def find_listed(name: str) -> list[ListedImage]:
    """The images of a data set of COCO's form whose files are there."""
    metadata = MetadataCatalog.get(name)
    paths = []
    for image in read_instances(metadata.json_file)["images"]:
        path = os.path.join(metadata.image_root, str(image.get("file_name")))
        if os.path.isfile(path):  # what is missing has been told
            paths.append(ListedImage(path, image.get("width"), image.get("height")))
    return paths
