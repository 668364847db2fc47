"""Image files: what of them training would read wrongly, and which one cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image

from contnet.data.findings import ERROR, Finding
from contnet.utils.errors import UserError

__all__ = ["NamedErrors", "check_depth"]

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


class NamedErrors:
    """A mapper that names the image that it cannot load.

    Args:
        mapper: makes a model input of a record.
    """

    def __init__(self, mapper: Callable[[dict], dict]):
        self.mapper = mapper

    def __call__(self, record: dict) -> dict:
        """What the mapper makes.

        Raises:
            UserError: if the image, or a file that belongs to it, is damaged, missing, or of
                another size than the record says.
        """
        try:
            return self.mapper(record)
        # Pillow has a SyntaxError for some damages of PNG.
        except (OSError, SyntaxError, SizeMismatchError, Image.DecompressionBombError) as error:
            raise UserError(
                f"{record.get('file_name')} cannot be loaded ({type(error).__name__}: {error}): "
                "python tools/doctor.py with this config tells all that is wrong"
            ) from error
