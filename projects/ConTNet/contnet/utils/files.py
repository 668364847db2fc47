"""Atomic writing of files, and helpers to find and open files."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from contnet.utils.errors import UserError

__all__ = [
    "NO_GUARD",
    "SET_ASIDE",
    "TEMPORARY_SUFFIX",
    "WriteError",
    "WriteGuard",
    "atomic_write",
    "describe_kind",
    "explain_os_error",
    "explaining_disk",
    "file_names",
    "open_regular",
    "set_aside",
    "writing",
]

TEMPORARY_SUFFIX = ".tmp"
# Folder next to a run's files, for those that the run no longer uses.
SET_ASIDE = "set_aside"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class WriteGuard:
    """Checks whether this process may write into a run's folder; this base class always allows it.

    Attributes:
        writer: part of the names of this process's unfinished files, which distinguishes them from
            those of others; "" if there are no others.
    """

    writer = ""

    def check(self) -> None:
        """Raises an error of the subclass if this process may no longer write."""


NO_GUARD = WriteGuard()


def file_names(folder: str | Path) -> set[str]:
    """Returns the names of the files, and of the links to files, in a folder.

    There are none if the folder does not exist or cannot be listed.
    """
    try:
        entries = os.scandir(folder)
    except (OSError, ValueError):  # ValueError: no folder can have this name
        return set()
    with entries:
        return {entry.name for entry in entries if _is_file(entry)}


def _is_file(entry: os.DirEntry) -> bool:
    """Whether an entry is a file or a link to one."""
    try:
        return entry.is_file()
    except OSError:  # circular links
        return False


def describe_kind(path: str | Path) -> str:
    """Describes a path that is not a regular file, such as "a pipe"; "" for a regular file.

    Links are followed.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a circular link"
        if error.errno == errno.ENOENT:
            return "a broken link" if os.path.islink(path) else "missing"
        return f"not accessible ({error.strerror or error})"
    except ValueError:  # a null byte, or a character that file names cannot contain
        return "an invalid file name"
    return _kind(status)


def _kind(status: os.stat_result) -> str:
    kind = stat.S_IFMT(status.st_mode)
    return "" if kind == stat.S_IFREG else _KINDS.get(kind, "not a file")


def open_regular(path: str | Path, mode: str = "rb", flags: int = 0, **kwargs) -> IO:
    """Opens a regular file like ``open``; never blocks, for example on a pipe.

    Args:
        path: path of the file.
        mode: as in ``open``.
        flags: additional flags of ``os.open``.
        **kwargs: as in ``open``, such as the encoding.

    Raises:
        OSError: if it cannot be opened, or is a pipe, a socket, a device or a folder.
    """

    def opener(name: str, standard: int) -> int:
        number = os.open(name, standard | flags | os.O_NONBLOCK, 0o666)
        if kind := _kind(os.fstat(number)):
            os.close(number)
            raise OSError(errno.EINVAL, f"it is {kind}", str(path))
        return number

    try:
        os.lstat(path)
    except OSError:
        pass  # the opener reports the error, or creates the file
    except ValueError as error:
        raise OSError(errno.EINVAL, "it is an invalid file name", str(path)) from error
    return open(path, mode, opener=opener, **kwargs)


def set_aside(path: str | Path) -> Path:
    """Moves a file into the folder ``set_aside`` next to it; returns its new path.

    An existing file of that name is kept: the new one gets a number.
    """
    path = Path(path)
    folder = path.parent / SET_ASIDE
    folder.mkdir(exist_ok=True)
    target, number = folder / path.name, 1
    while os.path.lexists(target):
        number += 1
        target = folder / f"{path.stem}.{number}{path.suffix}"
    os.replace(path, target)
    return target


def explain_os_error(error: OSError, path: str | Path) -> str:
    """Describes an error with a file for a message; if the disk is full, with its free space."""
    if isinstance(error, WriteError):
        return error.strerror
    reason = error.strerror or str(error)
    folder = Path(path).absolute().parent
    try:
        if error.errno == errno.ENOENT and not folder.is_dir():
            return f"the folder {folder} does not exist: was it moved or deleted?"
        if error.errno != errno.ENOSPC:
            return reason
        disk = os.statvfs(next(each for each in (folder, *folder.parents) if each.exists()))
    except OSError:
        return reason
    files = ", but no free inodes" if disk.f_files and not disk.f_favail else ""
    return f"{reason}: {disk.f_bavail * disk.f_frsize / 2**20:.1f} MiB are free there{files}"


class WriteError(UserError, OSError):
    """A file cannot be written; ``filename`` is its path, ``strerror`` the reason."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written ({self.strerror})"


def _is_of(error: OSError, path: str | Path) -> bool:
    """Whether an error is from writing a file: by its file name or, if it has none, its kind."""
    if error.filename is None:  # from writing, or from what is read meanwhile
        return error.errno in _DISK_ERRORS
    return str(error.filename).startswith(str(path))


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Context in which a file is written; turns system errors into ones that name the file.

    Args:
        path: path of the file. Errors that name another file, which was read, are not changed.

    Raises:
        WriteError: if the file cannot be written.
    """
    try:
        yield
    except WriteError:
        raise
    except (OSError, RuntimeError) as error:
        # torch.save raises its own error after the system's.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or not _is_of(cause, path):
            raise
        raise WriteError(cause.errno, explain_os_error(cause, path), str(path)) from error


@contextmanager
def explaining_disk(folder: str | Path) -> Iterator[None]:
    """Context of a run that turns disk errors into one-line messages.

    Args:
        folder: folder of the run, named if the error does not name a file.

    Raises:
        UserError: if the disk is full, broken or read-only, or the folder is gone.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        gone = error.errno == errno.ENOENT and not Path(folder).is_dir()
        if error.errno not in _DISK_ERRORS and not gone:
            raise
        path = Path(folder, "file") if gone or error.filename is None else error.filename
        raise UserError(f"{error.filename or folder}: {explain_os_error(error, path)}") from error


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb", guard: WriteGuard = NO_GUARD) -> Iterator[IO]:
    """Opens a file that gets its name only once it is complete and on the disk.

    A process that dies before that leaves ``<path>.tmp`` behind, which the next write replaces
    (``<path>.<writer>.tmp`` if the guard has a writer, which the next attempt of the run removes).

    Args:
        path: the final name; an older file of that name is replaced.
        mode: "wb" or "w".
        guard: called before the file is created and before it gets its name; if it raises,
            neither a new nor an unfinished file remains.

    Raises:
        WriteError: if it cannot be written; the older file is kept.
    """
    path = Path(path)
    name = f"{path.name}.{guard.writer}" if guard.writer else path.name
    temporary = path.with_name(name + TEMPORARY_SUFFIX)
    guard.check()
    try:
        with writing(path):
            with open(temporary, mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            guard.check()
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the original error is more important
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
