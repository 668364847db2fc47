"""The names of a run's checkpoints, as Checkpointer.save takes them: files without their .pth."""

from __future__ import annotations

import re
from pathlib import Path

from contnet.utils.errors import UserError

__all__ = [
    "BEST",
    "FINAL",
    "LAST_CHECKPOINT",
    "find_checkpoint",
    "has_last_checkpoint",
    "iteration_of",
    "last_checkpoint",
    "numbered_name",
]

# Detectron2's text file that says what a resume goes on from.
LAST_CHECKPOINT = "last_checkpoint"
# After the last iteration.
FINAL = "model_final"
# Of the best evaluation, which no resume goes on from.
BEST = "model_best"

_NUMBERED = re.compile(r"model_(\d+)")


def numbered_name(iteration: int) -> str:
    """The checkpoint after an iteration, counted from 0, that is not the last one."""
    return f"model_{iteration:07d}"


def iteration_of(name: str) -> int | None:
    """The iteration that a checkpoint's name has, None if it has none."""
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match else None


def has_last_checkpoint(output_dir: str | Path) -> bool:
    """Whether a run has a checkpoint that a resume would go on from."""
    return Path(output_dir, LAST_CHECKPOINT).exists()


def last_checkpoint(output_dir: str | Path) -> Path:
    """The file that a resume would go on from.

    Raises:
        OSError: if the run has none.
    """
    return Path(output_dir, Path(output_dir, LAST_CHECKPOINT).read_text().strip())


def find_checkpoint(output_dir: str | Path) -> Path | None:
    """The file that a resume goes on from, None if the run has none.

    Raises:
        UserError: if it is not there.
    """
    if not has_last_checkpoint(output_dir):
        return None
    path = last_checkpoint(output_dir)
    if not path.is_file():
        raise UserError(
            f"{Path(output_dir, LAST_CHECKPOINT)} names {path.name}, which is not there: write the "
            "name of a checkpoint of this folder into it"
        )
    return path
