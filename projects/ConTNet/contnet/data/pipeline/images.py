"""Decodes images from files and shards: upright, with 8 bits.

All readers of the project use this module, so that an image is the same in training, in evaluation
and in the doctor. The orientation follows ``PIL.ImageOps.exif_transpose``. Because a file may come
from anywhere, it must be a regular file in one of a few formats, and INPUT.MAX_PIXELS limits its
size before it is decoded.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from PIL import Image, UnidentifiedImageError

from contnet.config.keys import MAX_PIXELS
from contnet.data.datasets.image_files import IMAGE_FORMATS, open_image
from contnet.data.datasets.shards import read_sample, sample_name
from contnet.utils.errors import UserError
from contnet.utils.text import printable

__all__ = [
    "Decoded",
    "UnreadableFile",
    "decode",
    "decode_error",
    "has_more_frames",
    "read_image",
    "read_labels",
    "read_pixels",
    "read_size",
    "read_stored",
    "without_pillow_limit",
]

_limit_lock = threading.Lock()
_unlimited = 0  # number of threads in without_pillow_limit
_pillow_limit = None  # the limit that they restore

_EXIF_ORIENTATION = 0x0112  # the tag's number
_TIFF_TILE = (322, 323)  # the tags of a tile's width and height
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableFile(UserError):
    """Raised for a file that is not an image, is damaged or is too large; the message names it."""


class Decoded(NamedTuple):
    """A decoded image, and how it is stored.

    Attributes:
        image: upright image, in a mode of 8 bits.
        mode: Pillow mode in which it is stored.
        orientation: EXIF orientation, 1 to 8; 1 if there is none.
        peak: largest value before the conversion to 8 bits; None if there was no such conversion.
    """

    image: Image.Image
    mode: str
    orientation: int
    peak: int | None


@contextmanager
def without_pillow_limit() -> Iterator[None]:
    """Lets Pillow handle images of any size without a warning; INPUT.MAX_PIXELS limits them.

    Pillow's limit is global: the last thread that leaves restores it.
    """
    global _unlimited, _pillow_limit
    with _limit_lock:
        if not _unlimited:
            _pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _unlimited += 1
    try:
        yield
    finally:
        with _limit_lock:
            _unlimited -= 1
            if not _unlimited:
                Image.MAX_IMAGE_PIXELS = _pillow_limit


@contextmanager
def _open(record: dict) -> Iterator[Image.Image]:
    """Opens the image as stored, without decoding its pixels."""
    if "pixels" in record:
        yield record["pixels"]
        return
    source = io.BytesIO(read_sample(record)) if "offset" in record else record["file_name"]
    with open_image(source) as image:
        yield image


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 if there is none, or if EXIF is damaged."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
        return int(value) if value in _TURNS else 1
    except Exception:  # Pillow raises any exception on damaged EXIF; the pixels may be intact
        return 1


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    """Raises ValueError if decoding would take too much memory."""
    sizes = {"": image.size}
    if image.format == "TIFF" and all(tag in image.tag_v2 for tag in _TIFF_TILE):
        sizes["a tile of "] = tuple(image.tag_v2[tag] for tag in _TIFF_TILE)
    for what, (width, height) in sizes.items():
        if max_pixels and width * height > max_pixels:
            raise ValueError(
                f"it has {what}{width}x{height} pixels, more than INPUT.MAX_PIXELS {max_pixels}: "
                "raise that key; 0 means no limit"
            )


def _load(image: Image.Image, max_pixels: int) -> tuple[Image.Image, int]:
    """Returns the upright image and its EXIF orientation."""
    _check_pixels(image, max_pixels)
    orientation = _orientation(image)
    image.load()
    # Every Pillow version turns a TIFF on loading; some keep its orientation tag.
    turns = {} if image.format == "TIFF" else _TURNS
    return image.transpose(turns[orientation]) if orientation in turns else image, orientation


def _to_8_bits(image: Image.Image) -> tuple[Image.Image, int | None]:
    """Returns the image in an 8-bit mode, and its largest value if it had 16 bits, else None."""
    if image.mode.startswith("I"):  # grey in 16 bits; Pillow would clip values to 255
        values = np.asarray(image)
        low, peak = int(values.min(initial=0)), int(values.max(initial=0))
        if low < 0 or peak > 65535:
            raise ValueError(f"its pixel values, {low} to {peak}, do not fit 8 or 16 bits")
        # The upper 8 bits, which Pillow uses for colours in 16 bits, too.
        return Image.fromarray((values >> 8).astype(np.uint8)), peak
    if image.mode == "F":
        raise ValueError("its pixel values are not integers: save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA"), None  # Pillow warns otherwise
    if image.mode == "LAB":  # can be converted only to RGB
        return image.convert("RGB"), None
    return image, None


def decode_error(error: Exception) -> str:
    """Returns why an image cannot be decoded; Pillow's own message may have a memory address."""
    if isinstance(error, UnidentifiedImageError):
        return f"its format is not one of those supported: {', '.join(IMAGE_FORMATS)}"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _named(what: str, record: dict) -> Iterator[None]:
    """Turns any error with a file into an :class:`UnreadableFile` that names it."""
    try:
        yield
    except Exception as error:  # decoders raise any exception on a damaged file
        raise UnreadableFile(
            f"the {what} {printable(sample_name(record))} cannot be read "
            f"({printable(decode_error(error))})"
        ) from error


@contextmanager
def _decoded(record: dict, max_pixels: int) -> Iterator[Decoded]:
    with _named("image", record), without_pillow_limit(), _open(record) as stored:
        mode = stored.mode
        upright, orientation = _load(stored, max_pixels)
        image, peak = _to_8_bits(upright)
        yield Decoded(image, mode, orientation, peak)


def decode(record: dict, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decodes an image.

    Args:
        record: dict with ``file_name``; with ``offset`` and ``size`` too, the image is in a shard;
            with ``pixels``, it is this Pillow image.
        max_pixels: INPUT.MAX_PIXELS; 0 for no limit.

    Raises:
        UnreadableFile: if the image cannot be decoded completely or has too many pixels.
    """
    with _decoded(record, max_pixels) as decoded:
        return decoded


def has_more_frames(record: dict) -> bool:
    """Whether a file has several frames or pages, of which only the first is used.

    The views of a stereo camera count as one.
    """
    with _named("image", record), without_pillow_limit(), _open(record) as stored:
        return stored.format != "MPO" and getattr(stored, "is_animated", False)


def read_size(record: dict, max_pixels: int = MAX_PIXELS) -> tuple[int, int, int]:
    """Returns the width and height of the upright image, and its EXIF orientation, 1 to 8.

    Only the header is read, except for a TIFF that is turned, so the rest may be damaged. The
    arguments and errors are those of :func:`decode`, but 0 is the default limit for such a TIFF.
    """
    with _named("image", record), without_pillow_limit(), _open(record) as stored:
        orientation = _orientation(stored)
        if stored.format == "TIFF" and orientation != 1:
            # Not every Pillow version swaps its width and height before it is loaded.
            return *_load(stored, max_pixels or MAX_PIXELS)[0].size, orientation
        _check_pixels(stored, max_pixels)
        return *(stored.size[::-1] if orientation >= 5 else stored.size), orientation


def read_image(record: dict, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image; the arguments and errors are those of :func:`decode`.

    Returns:
        The upright RGB image, 8 bits per channel. Transparency is dropped, and 16-bit values are
        reduced to their upper 8 bits.
    """
    with _decoded(record, max_pixels) as decoded:
        image = decoded.image
        return image if image.mode == "RGB" else image.convert("RGB")


def read_pixels(record: dict, image_format: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image into an array, as Detectron2's ``read_image`` does.

    Args:
        record: see :func:`decode`; the errors are the same, too.
        image_format: INPUT.FORMAT: BGR, YUV-BT.601, or one of Pillow's modes.
        max_pixels: INPUT.MAX_PIXELS; 0 for no limit.

    Returns:
        The upright image, (H, W, C), uint8; floats for YUV-BT.601.
    """
    with _decoded(record, max_pixels) as decoded:
        return convert_PIL_to_numpy(decoded.image, image_format)


def read_labels(path: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an upright label map of 8-bit grey values: uint8 (H, W), values unchanged.

    Raises:
        UnreadableFile: if the label map cannot be decoded completely or has too many pixels.
    """
    record = {"file_name": path}
    with _named("label map", record), without_pillow_limit(), _open(record) as stored:
        return np.asarray(_load(stored, max_pixels)[0].convert("L"))


def read_stored(path: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image as stored, such as a 16-bit label map: (H, W) or (H, W, C).

    Raises:
        UnreadableFile: if the image cannot be decoded completely or has too many pixels.
    """
    with (
        _named("label map", {"file_name": path}),
        without_pillow_limit(),
        open_image(path) as image,
    ):
        _check_pixels(image, max_pixels)
        return np.array(image)
