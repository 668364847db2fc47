"""Private folders for caches, whose content is trusted.

The content of a cache is not checked again, so a forged file would be used. Therefore, a cache is a
folder that belongs to the user and that no other user can write into; its files belong to the user,
too, and are not links.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO

from contnet.utils.files import open_regular

__all__ = ["open_private", "private_folder"]

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def _refuse(reason: str, path: Path) -> PermissionError:
    return PermissionError(errno.EPERM, reason, str(path))


def _is_own(status: os.stat_result) -> bool:
    """Whether a file belongs to this user, or to root, who can change any file."""
    return status.st_uid in (os.geteuid(), 0)


def private_folder(path: str | Path) -> Path:
    """Creates a folder that only this user can enter, unless it exists; returns its resolved path.

    The path may contain links, such as one from ``~/.cache`` to a scratch disk. Parent folders
    that everyone may write into must have the sticky bit, like /tmp.

    Raises:
        OSError: if it cannot be created, or if others may write into it (PermissionError).
    """
    folder = Path(os.path.realpath(path))
    for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not _is_own(status):
        raise _refuse("it belongs to another user", folder)
    if status.st_mode & _OTHERS:
        raise _refuse(f"other users may write into it: chmod 700 {folder}", folder)
    for above in folder.parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise _refuse(f"every user may write into {above}, which has no sticky bit", folder)
    return folder


def open_private(path: str | Path, mode: str = "rb", **kwargs) -> IO:
    """Opens a file in a private folder, which must belong to this user and not be a link.

    Args:
        path: path of the file.
        mode: as in ``open``.
        **kwargs: as in ``open``, such as the encoding.

    Raises:
        OSError: if it cannot be opened, or is not such a file (PermissionError).
    """
    try:
        file = open_regular(path, mode, flags=os.O_NOFOLLOW, **kwargs)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _refuse("it is a link", Path(path)) from error
        raise
    if _is_own(os.fstat(file.fileno())):
        return file
    file.close()
    raise _refuse("it belongs to another user", Path(path))
