"""The records of what has been submitted from a run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from contnet.slurm.attempt_folder import slurm_folder
from contnet.utils.errors import UserError
from contnet.utils.files import atomic_write

__all__ = [
    "SUBMISSION_FILE",
    "add_submission",
    "last_submission",
    "read_submissions",
    "write_submissions",
]

SUBMISSION_FILE = "submission.json"


def read_submissions(folder: str | Path) -> list[dict]:
    """The records of submission.json, oldest first; none if there is no such file.

    Raises:
        UserError: if it does not hold records.
    """
    path = slurm_folder(folder) / SUBMISSION_FILE
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text())
        if all(isinstance(each["job_id"], str) and each["cluster"] for each in records):
            return records
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path} does not hold records of submissions: move it away")


def last_submission(folder: str | Path) -> dict:
    """The newest record.

    Raises:
        UserError: if there is none.
    """
    records = read_submissions(folder)
    if not records:
        raise UserError(
            f"{folder} has no slurm/{SUBMISSION_FILE}: nothing was submitted from this folder"
        )
    return records[-1]


def add_submission(folder: str | Path, record: dict) -> None:
    """Appends a record to submission.json."""
    slurm_folder(folder).mkdir(parents=True, exist_ok=True)
    write_submissions(folder, [*read_submissions(folder), record])


def write_submissions(folder: str | Path, records: Sequence[dict]) -> None:
    """Replaces submission.json."""
    with atomic_write(slurm_folder(folder) / SUBMISSION_FILE, "w") as file:
        json.dump(records, file, indent=1)
