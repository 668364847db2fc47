"""Finds a run's checkpoints; their names are those of Checkpointer.save, without .pth."""

from __future__ import annotations

import re
from pathlib import Path

from contnet.utils.errors import UserError
from contnet.utils.files import file_names
from contnet.utils.text import printable

__all__ = [
    "BEST",
    "FINAL",
    "LAST_CHECKPOINT",
    "checkpoint_files",
    "find_checkpoint",
    "has_last_checkpoint",
    "iteration_of",
    "last_checkpoint",
    "numbered_name",
    "published_file",
]

# Detectron2's text file with the name of the checkpoint to resume from.
LAST_CHECKPOINT = "last_checkpoint"
# The checkpoint after the last iteration.
FINAL = "model_final"
# The checkpoint of the best evaluation, which saving does not write into last_checkpoint.
BEST = "model_best"

_NUMBERED = re.compile(r"model_(\d+)")
_LONGEST_NAME = 255  # bytes
# Rejects paths, which could lead out of the folder, and bytes that cannot be decoded.
_FILE_NAME = re.compile(r"[^/\uFFFD]+\.pth")


def numbered_name(iteration: int) -> str:
    """Returns the name of the checkpoint after an iteration (from 0) other than the last one."""
    return f"model_{iteration:07d}"


def iteration_of(name: str) -> int | None:
    """Returns the iteration in a checkpoint's name; None if there is none."""
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match else None


def checkpoint_files(output_dir: str | Path) -> list[Path]:
    """Returns the checkpoints in a run's folder, sorted by name."""
    names = sorted(file_names(output_dir))
    known = [name for name in names if name.endswith(".pth")]
    return [
        Path(output_dir, name)
        for name in known
        if name[:-4] in (BEST, FINAL) or iteration_of(name[:-4]) is not None
    ]


def has_last_checkpoint(output_dir: str | Path) -> bool:
    """Whether a run has the file that names the checkpoint to resume from."""
    return Path(output_dir, LAST_CHECKPOINT).exists()


def last_checkpoint(output_dir: str | Path) -> Path:
    """Returns the checkpoint to resume from, which may not exist.

    Raises:
        OSError: if the run has no file that names it.
        UserError: if that file does not contain the name of a file in the run's folder.
    """
    path = Path(output_dir, LAST_CHECKPOINT)
    if not path.is_file() and path.exists():
        raise UserError(f"{path} is not a file: remove it")
    with open(path, "rb") as file:
        content = file.read(_LONGEST_NAME + 2)
    name = content.decode(errors="replace").strip()
    if not _FILE_NAME.fullmatch(name) or not name.isprintable():
        raise UserError(
            f"{path} must contain the name of a checkpoint in its folder, not "
            f"{printable(repr(name), 80)}: write one into it, or give a file with --resume-from"
        )
    return Path(output_dir, name)


def published_file(folder: str | Path) -> Path | None:
    """Returns the weights in a folder of tools/publish.py; None for other folders."""
    files = [Path(folder, name) for name in file_names(folder) if name.endswith(".safetensors")]
    return files[0] if len(files) == 1 else None


def find_checkpoint(output_dir: str | Path) -> Path | None:
    """Returns the checkpoint to resume from; None if the run has none.

    Raises:
        UserError: if ``last_checkpoint`` is not valid, or names a file that does not exist.
    """
    if not has_last_checkpoint(output_dir):
        return None
    path = last_checkpoint(output_dir)
    if not path.is_file():
        raise UserError(
            f"{Path(output_dir, LAST_CHECKPOINT)} names {path.name}, which does not exist: write "
            "the name of a checkpoint in this folder into it"
        )
    return path
