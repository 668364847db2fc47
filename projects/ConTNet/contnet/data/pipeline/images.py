"""Decodes images: from files and shards, upright, in RGB."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from contnet.data.datasets.shards import read_sample, sample_name
from contnet.utils.errors import UserError

__all__ = ["EXIF_ORIENTATION", "decode", "decode_error", "read_image"]

EXIF_ORIENTATION = 0x0112  # the tag's number
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _open(record: dict) -> Image.Image:
    """The image as it is stored, its pixels not yet decoded."""
    if "offset" in record:
        return Image.open(io.BytesIO(read_sample(record)))
    return Image.open(record["file_name"])


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, or where EXIF is damaged."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # Pillow raises anything on damaged EXIF; the pixels may be whole
        return 1
    return value if value in _TURNS else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # grey in 16 bits; Pillow would cut values off at 255
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("its pixels are not of 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are no whole numbers")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns otherwise
    return image.convert("RGB")


def decode_error(error: Exception) -> str:
    """Why an image cannot be decoded; Pillow's own words may name an address in memory."""
    if isinstance(error, UnidentifiedImageError):
        return "it is of no kind that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__


def decode(record: dict) -> tuple[Image.Image, str, bool]:
    """An image in RGB and upright; the mode in which it is stored; whether it was turned.

    Raises:
        UserError: naming the file, if it cannot be decoded whole.
    """
    try:
        with _open(record) as image:
            mode, turn = image.mode, _orientation(image)
            image.load()
            upright = image.transpose(_TURNS[turn]) if turn in _TURNS else image
            return _to_rgb(upright), mode, turn in _TURNS
    except Exception as error:  # decoders raise anything on a damaged file
        raise UserError(
            f"the image {sample_name(record)} cannot be read ({decode_error(error)}): "
            "python tools/doctor.py with this config lists all such"
        ) from error


def read_image(record: dict) -> Image.Image:
    """Decodes an image.

    Args:
        record: with ``file_name``; with ``offset`` and ``size`` too it is in a shard.

    Returns:
        It in RGB, 8 bits each, turned as its EXIF says. Transparency is dropped.

    Raises:
        UserError: naming the file, if it cannot be decoded whole.
    """
    return decode(record)[0]
