"""A copy of the code, so that a job runs what was there when it was submitted."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

__all__ = ["LARGEST_FILE", "list_code", "take_snapshot"]

# Bytes; what is larger is data that git was not told to ignore, not code.
LARGEST_FILE = 20 * 2**20

_PACKAGE = Path(__file__).resolve().parents[1]


def _git_files(folder: Path) -> tuple[Path, list[str]] | None:
    """The root of the repository around a folder, and what git does not ignore in it."""
    git = ["git", "-C", str(folder)]
    listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard", "--full-name"]
    try:
        root = subprocess.run(
            [*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, timeout=60
        )
        if root.returncode:
            return None
        top = root.stdout.strip()
        files = subprocess.run(
            ["git", "-C", top, *listing], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return Path(top), sorted(set(files.stdout.split("\0")) - {""})


def list_code() -> tuple[Path, list[str], list[str], str]:
    """What a snapshot would hold.

    Returns:
        The folder that all paths start in; the files to copy, tracked by git or not, but not those
        that it ignores (only the package where it is not in git); files that are left out since
        they exceed :data:`LARGEST_FILE`; and the folder of the copy that holds the package.
    """
    package = _PACKAGE
    found = _git_files(package)
    inside = found is not None and package.is_relative_to(found[0])
    if inside and str((package / "__init__.py").relative_to(found[0])) in found[1]:
        root, names = found
    else:  # installed, perhaps into an environment that lies in some repository
        root = package.parent
        names = [
            str(path.relative_to(root))
            for path in sorted(package.rglob("*"))
            if "__pycache__" not in path.parts and not path.is_dir()
        ]
    files = [name for name in names if (root / name).is_symlink() or (root / name).is_file()]
    large = [
        name
        for name in files
        if not (root / name).is_symlink() and (root / name).stat().st_size > LARGEST_FILE
    ]
    kept = [name for name in files if name not in set(large)]
    return root, kept, large, str(package.parent.relative_to(root))


def _copy_link(source: Path, target: Path, root: Path) -> None:
    """A link that leads where the original leads, or into the copy if that led into the root."""
    to = os.readlink(source)
    end = Path(os.path.normpath(source.parent / to))
    target.symlink_to(to if end.is_relative_to(root) and not os.path.isabs(to) else end)


def take_snapshot(folder: Path) -> Path:
    """Copies the code into a folder, which is made.

    Returns:
        What belongs on PYTHONPATH.
    """
    root, files, _, path = list_code()
    for name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_symlink():
            _copy_link(root / name, target, root)
        else:
            shutil.copy2(root / name, target)
    return folder / path
