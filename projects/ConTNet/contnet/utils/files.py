"""Files that are either whole or not there, and which are there."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["TEMPORARY_SUFFIX", "atomic_write", "check_may_write", "file_names", "guard_writes"]

TEMPORARY_SUFFIX = ".tmp"
_guards: dict[str, Callable[[], None]] = {}


def file_names(folder: str | Path) -> set[str]:
    """Names of the files in a folder, none if it is not there; links count that lead to files."""
    if not os.path.isdir(folder):
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def guard_writes(writer: str, guard: Callable[[], None]) -> None:
    """Has ``guard`` asked before any file is written.

    Args:
        writer: tells the unfinished files of this process from those of others.
        guard: does not return if this process may write no longer.
    """
    _guards[writer] = guard


def check_may_write() -> None:
    """Asks the guards, for files that are written in another way than :func:`atomic_write`."""
    for guard in _guards.values():
        guard()


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Opens a file that takes its name only once it is complete and on the disk.

    A process that dies before that leaves ``<path>.tmp`` behind, which the next write replaces
    (``<path>.<writer>.tmp`` of a guarded one, which the next attempt of the run removes).

    Args:
        path: the final name; an older file of that name is replaced.
        mode: "wb" or "w".
    """
    path = Path(path)
    temporary = path.with_name(".".join([path.name, *_guards]) + TEMPORARY_SUFFIX)
    check_may_write()
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_may_write()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
