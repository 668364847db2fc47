"""JSON files that are read again, each of which may be damaged since it was written."""

from __future__ import annotations

import json
import logging
import os
from functools import cache
from pathlib import Path

import msgspec

from contnet.utils.errors import UserError
from contnet.utils.files import explain_os_error, set_aside
from contnet.utils.text import printable

__all__ = [
    "DamagedFile",
    "begin_anew",
    "parse_record",
    "peek_record",
    "read_bytes",
    "read_record",
    "recover_record",
    "warn_once",
]

logger = logging.getLogger(__name__)


class DamagedFile(UserError):
    """A file that cannot be read, and never will be."""


@cache
def warn_once(line: str) -> None:
    """Logs a warning, once in this process."""
    logger.warning(line)


def parse_record(data: bytes, form: object) -> object:
    """The value of a JSON text.

    Args:
        data: the text.
        form: a type that the value must have, as msgspec checks it. Keys that a TypedDict does not
            name are kept.

    Raises:
        ValueError: if it is no JSON, or of another form.
    """
    try:
        value = json.loads(data)
        msgspec.convert(value, form)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def read_bytes(path: str | Path) -> bytes | None:
    """What is in a file, None if it is not there.

    Raises:
        DamagedFile: if it is no file, or may not be read.
        UserError: if the disk does not give it.
    """
    path = Path(path)
    try:
        if path.is_file():  # a pipe would be waited for
            return path.read_bytes()
    except FileNotFoundError:  # gone meanwhile
        return None
    except OSError as error:
        kind = DamagedFile if isinstance(error, PermissionError) else UserError
        raise kind(f"{path} cannot be read ({explain_os_error(error, path)})") from error
    if os.path.lexists(path):
        raise DamagedFile(f"{path} cannot be read (it is not a file)")
    return None


def read_record(path: str | Path, form: object) -> object | None:
    """The content of a JSON file, None if it is not there.

    Args:
        path: of the file.
        form: as of :func:`parse_record`.

    Raises:
        DamagedFile: if it is no file, may not be read, is no JSON, or is of another form.
        UserError: if the disk does not give it.
    """
    if (data := read_bytes(path)) is None:
        return None
    try:
        return parse_record(data, form)
    except ValueError as error:
        raise DamagedFile(f"{path} cannot be read ({printable(str(error))})") from error


def peek_record(path: str | Path, form: object) -> object | None:
    """As :func:`read_record`, for those who only look: a warning and None for what is damaged."""
    try:
        return read_record(path, form)
    except UserError as error:
        warn_once(f"{error}: it is skipped")
        return None


def begin_anew(path: str | Path, error: DamagedFile) -> None:
    """Sets a damaged file aside, and says so.

    Raises:
        OSError: if it cannot be moved.
    """
    logger.warning(f"{error}: it is set aside as {set_aside(path)}, and starts empty")


def recover_record(path: str | Path, form: object) -> object | None:
    """As :func:`read_record`, for those who write it anew: what is damaged is set aside.

    Raises:
        UserError: if the disk does not give it.
        OSError: if it cannot be set aside.
    """
    try:
        return read_record(path, form)
    except DamagedFile as error:
        begin_anew(path, error)
        return None
