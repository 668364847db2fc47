"""The records of what has been submitted from a run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Annotated, Literal, NotRequired, TypedDict

from msgspec import Meta

from contnet.slurm.attempt_folder import slurm_folder
from contnet.utils.errors import UserError
from contnet.utils.files import atomic_write, open_regular
from contnet.utils.records import peek_record, read_record, recover_record

__all__ = [
    "SUBMISSION_FILE",
    "add_submission",
    "last_submission",
    "open_log",
    "read_submissions",
    "write_submissions",
]

SUBMISSION_FILE = "submission.json"
# Neither an option of SLURM's commands nor a list of jobs.
_JobId = Annotated[str, Meta(pattern=r"^[0-9]{1,18}(_[0-9]{1,9})?\Z")]
# Where an array runs here, its runs have no job of their own.
_RunJobId = Annotated[str, Meta(pattern=r"^([0-9]{1,18}(_[0-9]{1,9})?)?\Z")]
# Of a folder in another one.
_Name = Annotated[str, Meta(pattern=r"^(?!\.\.?\Z)[^/]+\Z")]
# Of a file or folder whose last part alone is used.
_Path = Annotated[str, Meta(pattern=r"(?s)^(.*/)?(?!\.\.?\Z)[^/\0]{1,255}\Z")]


class _Submission(TypedDict):
    """What is read of a record; what else there is stays."""

    time: str
    cluster: Literal["slurm", "local"]
    host: str
    job_id: _JobId
    runs: dict[_Name, _RunJobId]
    run_folder: str
    job_folder: _Path
    log: _Path
    nodes: int
    tasks: int
    process_start: str
    cancelled: NotRequired[str]


def _placed(record: dict, folder: Path) -> dict:
    """The record of a run that is in this folder now, with paths that do not lead out of it."""
    job_folder = Path(record["job_folder"])
    # The runs of an array have theirs together, in the folder above them.
    base = folder if job_folder.parent.parent == Path(record["run_folder"]) else folder.parent
    job_folder = slurm_folder(base) / job_folder.name
    log = job_folder / Path(record["log"]).name
    return {**record, "run_folder": str(folder), "job_folder": str(job_folder), "log": str(log)}


def _file(folder: str | Path) -> Path:
    return slurm_folder(folder) / SUBMISSION_FILE


def _read(folder: str | Path, reader: Callable) -> list[dict]:
    """The records, as one of the readers of :mod:`contnet.utils.records` gives them."""
    records = reader(_file(folder), list[_Submission]) or []
    return [_placed(each, Path(folder).absolute()) for each in records]


def read_submissions(folder: str | Path) -> list[dict]:
    """The records of submission.json, oldest first; none if it is not there, or damaged.

    Their paths are those of the folder as it is now.
    """
    return _read(folder, peek_record)


def last_submission(folder: str | Path) -> dict:
    """The newest record.

    Raises:
        UserError: if there is none.
    """
    records = _read(folder, read_record)
    if not records:
        raise UserError(
            f"{folder} has no slurm/{SUBMISSION_FILE}: nothing was submitted from this folder"
        )
    return records[-1]


def add_submission(folder: str | Path, record: dict) -> None:
    """Appends a record to submission.json."""
    slurm_folder(folder).mkdir(parents=True, exist_ok=True)
    write_submissions(folder, [*_read(folder, recover_record), record])


def write_submissions(folder: str | Path, records: Sequence[dict]) -> None:
    """Replaces submission.json."""
    with atomic_write(_file(folder), "w") as file:
        json.dump(records, file, indent=1)


def open_log(path: str | Path) -> IO[bytes] | None:
    """Opens a log of a submission; None if it is not there yet.

    Args:
        path: in the ``job_folder`` of a record.

    Raises:
        UserError: for anything but a file in the run's folder.
    """
    path = Path(path)
    if not path.exists():
        return None
    base = path.parent.parent.parent
    if not path.resolve().is_relative_to(base.resolve()) or not path.is_file():
        raise UserError(f"{path} is not a log of this run, but a link to {path.resolve()}")
    return open_regular(path)
