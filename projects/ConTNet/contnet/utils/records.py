"""Reads JSON files, which may have been damaged since they were written."""

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
    """A file that is damaged or may not be read, so that trying again does not help."""


@cache
def warn_once(line: str) -> None:
    """Logs a warning, once per process."""
    logger.warning(line)


def parse_record(data: bytes, form: object) -> object:
    """Returns the value of a JSON text.

    Args:
        data: the text.
        form: type that the value must have, checked by msgspec. Keys that a TypedDict does not
            declare are kept.

    Raises:
        ValueError: if it is not valid JSON, or of another type.
    """
    try:
        value = json.loads(data)
        msgspec.convert(value, form)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def read_bytes(path: str | Path) -> bytes | None:
    """Returns the content of a file; None if it does not exist.

    Raises:
        DamagedFile: if it is not a file, or may not be read.
        UserError: if the disk fails.
    """
    path = Path(path)
    try:
        if path.is_file():  # a pipe would block
            return path.read_bytes()
    except FileNotFoundError:  # deleted meanwhile
        return None
    except OSError as error:
        kind = DamagedFile if isinstance(error, PermissionError) else UserError
        raise kind(f"{path} cannot be read ({explain_os_error(error, path)})") from error
    if os.path.lexists(path):
        raise DamagedFile(f"{path} cannot be read (it is not a file)")
    return None


def read_record(path: str | Path, form: object) -> object | None:
    """Returns the content of a JSON file; None if it does not exist.

    Args:
        path: path of the file.
        form: as in :func:`parse_record`.

    Raises:
        DamagedFile: if it is not a file, may not be read, is not valid JSON, or of another type.
        UserError: if the disk fails.
    """
    if (data := read_bytes(path)) is None:
        return None
    try:
        return parse_record(data, form)
    except ValueError as error:
        raise DamagedFile(f"{path} cannot be read ({printable(str(error))})") from error


def peek_record(path: str | Path, form: object) -> object | None:
    """Like :func:`read_record`, but returns None, with a warning, if the file cannot be read."""
    try:
        return read_record(path, form)
    except UserError as error:
        warn_once(f"{error}: it is skipped")
        return None


def begin_anew(path: str | Path, error: DamagedFile) -> None:
    """Sets a damaged file aside, with a warning.

    Raises:
        OSError: if it cannot be moved.
    """
    logger.warning(f"{error}: it is set aside as {set_aside(path)}, and a new one is started")


def recover_record(path: str | Path, form: object) -> object | None:
    """Like :func:`read_record`, but sets a damaged file aside, so that it can be written anew.

    Raises:
        UserError: if the disk fails.
        OSError: if it cannot be set aside.
    """
    try:
        return read_record(path, form)
    except DamagedFile as error:
        begin_anew(path, error)
        return None
