"""Chooses the checkpoint to resume from, and moves later checkpoints aside."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from contnet.checkpoint.names import (
    BEST,
    LAST_CHECKPOINT,
    checkpoint_files,
    has_last_checkpoint,
    iteration_of,
    last_checkpoint,
    numbered_name,
)
from contnet.checkpoint.reading import read_checkpoint
from contnet.checkpoint.verification import verify_file
from contnet.engine.resume import trainer_state
from contnet.utils.errors import UserError
from contnet.utils.files import (
    NO_GUARD,
    SET_ASIDE,
    TEMPORARY_SUFFIX,
    WriteGuard,
    atomic_write,
    set_aside,
)

__all__ = ["ResumeFile", "choose_checkpoint", "last_name", "make_last"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumeFile:
    """The checkpoint to resume from.

    Attributes:
        path: its path; "" if there is none.
        warnings: reasons why it is not the expected one, one line each.
        last: value of :func:`last_name` when it was chosen.
    """

    path: str = ""
    warnings: tuple[str, ...] = ()
    last: str = ""


def _images(content: Mapping) -> int:
    """Number of images that a checkpoint has seen, which is comparable for all batch sizes."""
    state = trainer_state(content)
    stream = state.get("stream")
    # The first versions did not count images; the iteration sorts them before later checkpoints.
    seen = stream.get("images_seen") if isinstance(stream, Mapping) else None
    found = state.get("iteration") if seen is None else seen
    return found if isinstance(found, int) else -1


def _images_of(path: Path) -> int | None:
    """Number of images that a file's checkpoint has seen; None if it cannot be read."""
    try:
        return _images(read_checkpoint(str(path)))
    except UserError:
        return None


def _damage(path: Path, tensors: bool = True) -> str:
    """Describes the damage of a checkpoint; "" if it is undamaged."""
    if not path.is_file():
        return f"{path} does not exist"
    try:
        read_checkpoint(str(path))
        if tensors:
            with open(path, "rb") as file:
                verify_file(file, str(path))
    except UserError as error:
        return str(error)
    return ""


def _newest_whole(folder: Path, before: Path | None = None, tensors: bool = True) -> Path | None:
    """The latest undamaged checkpoint in a folder; None if there is none.

    Args:
        folder: folder of the run.
        before: only consider checkpoints before this one.
        tensors: verify tensors, too.
    """
    images = {path: _images_of(path) for path in checkpoint_files(folder) if path.stem != BEST}
    limit = None if before is None else images.pop(before, None)
    number = None if before is None or limit is not None else iteration_of(before.stem)
    found = [path for path, seen in images.items() if seen is not None]
    for path in sorted(found, key=images.get, reverse=True):
        own = iteration_of(path.stem)
        if limit is not None and images[path] > limit:
            continue
        if number is not None and (own is None or own > number):
            continue
        if not _damage(path, tensors):
            return path
    return None


def last_name(output_dir: str | Path) -> str:
    """The name in ``last_checkpoint``; "" if it does not exist or names no checkpoint."""
    try:
        return last_checkpoint(output_dir).name
    except (OSError, UserError):
        return ""


def choose_checkpoint(output_dir: str | Path, file: str = "", tensors: bool = True) -> ResumeFile:
    """Chooses the checkpoint to resume from.

    It is the one named in ``last_checkpoint`` or, if that is damaged or missing, the newest
    undamaged one before it. Nothing is written.

    Args:
        output_dir: the run's folder.
        file: use this checkpoint instead.
        tensors: verify tensors, too, not only the rest of the file.

    Raises:
        UserError: if ``file``, or every checkpoint in the folder, is damaged; if the folder has
            checkpoints but no ``last_checkpoint``, unless its first save was interrupted.
    """
    folder = Path(output_dir)
    named = last_name(folder)
    if file:
        if reason := _damage(Path(file), tensors):
            raise UserError(reason)
        return ResumeFile(file, last=named)
    if not has_last_checkpoint(folder):
        return _without_last(folder, tensors)
    last = last_checkpoint(folder)
    if not (reason := _damage(last, tensors)):
        return ResumeFile(str(last), last=named)
    if (path := _newest_whole(folder, last, tensors)) is None:
        raise UserError(
            f"{reason}; {folder / LAST_CHECKPOINT} names it, and there is no complete checkpoint "
            "before it: choose one with --resume-from FILE, or start in another OUTPUT_DIR"
        )
    warning = f"{reason}; {path}, the newest complete one before it, is used"
    return ResumeFile(str(path), (warning,), named)


def _without_last(folder: Path, tensors: bool) -> ResumeFile:
    if not checkpoint_files(folder):
        return ResumeFile()
    path = _newest_whole(folder, tensors=tensors)
    if path and any(folder.glob(f"{LAST_CHECKPOINT}*{TEMPORARY_SUFFIX}")):
        warning = (
            f"the first save into {folder} was interrupted at its end: its {path.name} is used"
        )
        return ResumeFile(str(path), (warning,))
    found = f"the newest complete one is {path}: resume from it with --resume-from {path}"
    raise UserError(
        f"{folder} has checkpoints, but no {LAST_CHECKPOINT} that says which one to resume from; "
        f"{found if path else 'none is complete: choose another OUTPUT_DIR'}"
    )


def _adopt(folder: Path, file: Path, number: int, guard: WriteGuard) -> Path:
    """Copies a checkpoint into a run's folder, unless it is there and is not ``model_best``."""
    if file.parent.resolve() == folder.resolve() and file.stem != BEST:
        return folder / file.name
    path = folder / f"{numbered_name(number)}.pth"
    with open(file, "rb") as source, atomic_write(path, guard=guard) as copy:
        shutil.copyfileobj(source, copy, 2**20)
        copy.flush()
        with open(copy.name, "rb") as written:
            verify_file(written, path.name)
        if path.exists():
            set_aside(path)
    return path


def make_last(output_dir: str | Path, file: str, guard: WriteGuard = NO_GUARD) -> list[Path]:
    """Makes a checkpoint the last one of a run, and moves later or damaged ones aside.

    Args:
        output_dir: the run's folder.
        file: an undamaged checkpoint; it is copied if it is in another folder.
        guard: called before anything is written.

    Returns:
        The remaining checkpoints in the folder, in the order of images seen.
    """
    folder, content = Path(output_dir), read_checkpoint(file)
    path = _adopt(folder, Path(file), trainer_state(content)["iteration"], guard)
    # First, so that a resume uses this checkpoint even if this function is interrupted.
    with atomic_write(folder / LAST_CHECKPOINT, "w", guard) as pointer:
        pointer.write(path.name)
    images = {each: _images_of(each) for each in checkpoint_files(folder)}
    limit = images[path] = _images(content)
    aside = [each for each, seen in images.items() if seen is None or seen > limit]
    for each in aside:
        guard.check()
        set_aside(each)
        del images[each]
    if aside:
        names = ", ".join(each.name for each in aside)
        logger.warning(
            f"The run resumes from {path}: later or damaged checkpoints ({names}) have been moved "
            f"to {folder / SET_ASIDE}"
        )
    return sorted(images, key=images.get)
