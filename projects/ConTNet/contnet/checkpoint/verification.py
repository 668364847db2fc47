"""Detects damaged weight files, before anything is loaded from them.

``torch.save`` writes the CRC-32 of each part of its zip file, which ``torch.load`` ignores. Other
formats have no checksum. If a file name ends with the first digits of the file's SHA-256, as for
torchvision's and converted files, the SHA-256 is compared.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from pathlib import Path
from typing import BinaryIO

from contnet.utils.errors import UserError
from contnet.utils.text import printable

__all__ = ["digest_in_name", "verify_file"]

# At least one letter is required, because only decimal digits may be a date.
_HASH = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8,64})$")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
_TENSOR = re.compile(r"[^/]*/data/\d+")
_CHUNK = 2**20  # bytes


def digest_in_name(path: str) -> str:
    """Returns the first digits of a SHA-256 at the end of a file's name; "" if there are none."""
    stem = Path(path).stem
    found = _HASH.search(stem)
    return found[1] if found and not _UUID.search(stem) else ""


def _read_parts(file: BinaryIO, tensors: bool) -> None:
    """Reads the parts of a zip file of torch.save; zipfile compares their CRC-32."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        # Parts are not compressed, so if they are larger than the file, they must not be read.
        if sum(part.file_size for part in parts) > file.seek(0, os.SEEK_END):
            raise zipfile.BadZipFile("its parts are larger than the file")
        if not any(part.CRC for part in parts):
            return  # saved with set_crc32_options(False)
        for part in parts:
            if tensors or not _TENSOR.fullmatch(part.filename):
                with archive.open(part) as content:
                    while content.read(_CHUNK):
                        pass


def verify_file(file: BinaryIO, path: str, tensors: bool = True, digest: str = "") -> str:
    """Verifies that a weight file is undamaged.

    Args:
        file: open file, at its beginning, to which it is reset afterwards.
        path: path of the file.
        tensors: whether to verify the whole file, not only the parts without tensors.
        digest: SHA-256 of the file or the start of it, which overrides the one in the name.

    Returns:
        The SHA-256 of the file if it was compared, otherwise "".

    Raises:
        UserError: if the file is damaged, or its SHA-256 differs.
    """
    if file.read(2) == b"PK":
        try:
            _read_parts(file, tensors)
        except Exception as error:  # a damaged file may raise anything
            reason = printable(" ".join(str(error).split()) or type(error).__name__, 200)
            raise UserError(
                f"{path} cannot be read, it is damaged or truncated: {reason}"
            ) from error
    file.seek(0)
    expected = digest or digest_in_name(path)
    if not tensors or not expected:
        return ""
    found = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    if not found.startswith(expected):
        raise UserError(
            f"{path} is damaged: its SHA-256 begins with {found[: len(expected)]}, not as in its "
            f"{'address' if digest else 'name'}; download it again, or rename it if it was changed "
            "on purpose"
        )
    return found
