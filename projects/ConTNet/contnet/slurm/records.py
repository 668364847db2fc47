"""Records of the submissions from a run folder."""

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
# This is neither an option of SLURM's commands nor a list of jobs.
_JobId = Annotated[str, Meta(pattern=r"^[0-9]{1,18}(_[0-9]{1,9})?\Z")]
# Empty for runs without a job in this record: finished ones, and those of a local array.
_RunJobId = Annotated[str, Meta(pattern=r"^([0-9]{1,18}(_[0-9]{1,9})?)?\Z")]
# Name of a subfolder, which cannot lead out of its parent.
_Name = Annotated[str, Meta(pattern=r"^(?!\.\.?\Z)[^/]+\Z")]
# Path of a file or folder, of which only the last part is used.
_Path = Annotated[str, Meta(pattern=r"(?s)^(.*/)?(?!\.\.?\Z)[^/\0]{1,255}\Z")]


class _Submission(TypedDict):
    """The keys of a record that are read; other keys are kept."""

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
    """Returns a record with its paths moved to the folder where the run is now."""
    job_folder = Path(record["job_folder"])
    # The runs of an array share one, in the folder above theirs.
    base = folder if job_folder.parent.parent == Path(record["run_folder"]) else folder.parent
    job_folder = slurm_folder(base) / job_folder.name
    log = job_folder / Path(record["log"]).name
    return {**record, "run_folder": str(folder), "job_folder": str(job_folder), "log": str(log)}


def _file(folder: str | Path) -> Path:
    return slurm_folder(folder) / SUBMISSION_FILE


def _read(folder: str | Path, reader: Callable) -> list[dict]:
    """Returns the records, read with a function of :mod:`contnet.utils.records`."""
    records = reader(_file(folder), list[_Submission]) or []
    return [_placed(each, Path(folder).absolute()) for each in records]


def read_submissions(folder: str | Path) -> list[dict]:
    """Returns the records of submission.json, oldest first; none if it is missing or damaged.

    Their paths are in the folder's current location.
    """
    return _read(folder, peek_record)


def last_submission(folder: str | Path) -> dict:
    """Returns the newest record.

    Raises:
        UserError: if there is none, or the file is damaged.
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
    """Opens a log of a submission; returns None if it does not exist yet.

    Args:
        path: path of the log, in the ``job_folder`` of a record.

    Raises:
        UserError: if it is not a file in the run's folder.
    """
    path = Path(path)
    if not path.exists():
        return None
    base = path.parent.parent.parent
    if not path.resolve().is_relative_to(base.resolve()) or not path.is_file():
        raise UserError(f"{path} is not a log of this run, but a link to {path.resolve()}")
    return open_regular(path)
