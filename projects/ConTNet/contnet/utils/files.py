"""Files that are either whole or not there, and which are there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["NO_GUARD", "TEMPORARY_SUFFIX", "WriteGuard", "atomic_write", "file_names"]

TEMPORARY_SUFFIX = ".tmp"


class WriteGuard:
    """Whether this process may still write into a run's folder; by this one it always may.

    Attributes:
        writer: tells the unfinished files of this process from those of others, by their names; ""
            where there are no others.
    """

    writer = ""

    def check(self) -> None:
        """Raises what the subclass says if this process may write no longer."""


NO_GUARD = WriteGuard()


def file_names(folder: str | Path) -> set[str]:
    """Names of the files in a folder, none if it is not there; links count that lead to files."""
    if not os.path.isdir(folder):
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb", guard: WriteGuard = NO_GUARD) -> Iterator[IO]:
    """Opens a file that takes its name only once it is complete and on the disk.

    A process that dies before that leaves ``<path>.tmp`` behind, which the next write replaces
    (``<path>.<writer>.tmp`` if the guard has a writer, which the next attempt of the run removes).

    Args:
        path: the final name; an older file of that name is replaced.
        mode: "wb" or "w".
        guard: is asked before the file is begun and before it takes its name; if it raises, there
            is no new file, and nothing unfinished.
    """
    path = Path(path)
    name = f"{path.name}.{guard.writer}" if guard.writer else path.name
    temporary = path.with_name(name + TEMPORARY_SUFFIX)
    guard.check()
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        guard.check()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
