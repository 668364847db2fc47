"""The files that a job writes into the ``slurm`` folder of its run.

``requeues.json`` lists the attempts that were requeued. ``attempts/<job>-<restart>`` contains, for
each attempt, the heartbeat of each rank (``rank-00000.json``), stack traces (``rank-00000.stack``),
and notes that are written once: ``failure.json`` by the rank that failed first, ``exit.json`` by
rank 0 when it has decided how the attempt ends, and ``signalled.json``. A JSON file is either
complete or does not exist.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

from msgspec import Meta

from contnet.checkpoint.names import iteration_of, last_checkpoint
from contnet.utils.errors import UserError
from contnet.utils.files import NO_GUARD, WriteGuard, atomic_write, set_aside
from contnet.utils.records import peek_record, recover_record

__all__ = [
    "AttemptFolder",
    "last_requeued",
    "last_saved_iteration",
    "read_requeues",
    "record_requeue",
    "slurm_folder",
    "write_json",
]

# A note this many seconds older than an attempt is from another one with the same number, on a
# cluster whose job ids have started over.
_STALE = 300.0

# The types of these files. Numbers have bounds, which exclude NaN.
_Time = Annotated[float, Meta(ge=0, le=1e11)]
_Count = Annotated[int, Meta(ge=-1, le=2**62)]


class _Heartbeat(TypedDict):
    rank: _Count
    host: str
    pid: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    phase: str
    iteration: _Count
    max_iter: _Count
    heartbeat_interval: _Time
    ended: str | None
    time: _Time


class _Failure(TypedDict):
    rank: _Count
    reason: str
    time: _Time
    details: NotRequired[str]
    lost: NotRequired[bool]


class _Exit(TypedDict):
    requeued: bool
    reason: str
    status: Annotated[int, Meta(ge=0, le=255)]
    time: _Time
    iteration: NotRequired[_Count]


class _Signalled(TypedDict):
    signal: str
    time: _Time


class _Requeue(TypedDict):
    job_id: str
    iteration: _Count
    reason: str


_NOTES = {"failure": _Failure, "exit": _Exit, "signalled": _Signalled}


def slurm_folder(run_folder: str | Path) -> Path:
    """Returns the folder for the job files of a run."""
    return Path(run_folder, "slurm")


def _replace(new: Path, path: Path) -> None:
    """Renames a file over another one; a folder of that name is set aside."""
    if path.is_dir():
        set_aside(path)
    os.replace(new, path)


def write_json(path: Path, value: object) -> None:
    """Writes a file atomically, but without fsync, because heartbeats are frequent."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value))
    _replace(temporary, path)


class AttemptFolder:
    """Heartbeats and notes of one attempt of a job."""

    def __init__(self, run_folder: str | Path, job_id: str, restart: int):
        self.path = slurm_folder(run_folder) / "attempts" / f"{job_id}-{restart:03d}"
        self.opened = time.time()

    def rank_file(self, rank: int, suffix: str) -> Path:
        """Returns the path of a file of a rank."""
        return self.path / f"rank-{rank:05d}{suffix}"

    def write_heartbeat(self, record: dict) -> None:
        """Replaces the heartbeat of ``record["rank"]``."""
        write_json(self.rank_file(record["rank"], ".json"), {**record, "time": time.time()})

    def ranks(self) -> dict[int, dict]:
        """Returns the last heartbeat of each rank."""
        files = sorted(self.path.glob("rank-*.json"))
        found = [peek_record(path, _Heartbeat) for path in files]
        return {record["rank"]: record for record in found if record}

    def note(self, name: str, record: dict) -> bool:
        """Writes a note unless a rank has written it before; returns whether it was written."""
        path = self.path / f"{name}.json"
        own = self.path / f"{name}-{record['rank']:05d}.new"
        try:
            own.write_text(json.dumps({**record, "time": time.time()}))
            os.link(own, path)
        except FileExistsError:
            if self.read(name) is not None:
                return False
            _replace(own, path)
            return True
        finally:
            own.unlink(missing_ok=True)
        return True

    def read(self, name: str, any_age: bool = False) -> dict | None:
        """Returns a note; None if it is missing, damaged or, unless ``any_age``, too old."""
        record = peek_record(self.path / f"{name}.json", _NOTES[name])
        if record is None or any_age or record["time"] > self.opened - _STALE:
            return record
        return None


def _requeues_file(run_folder: str | Path) -> Path:
    return slurm_folder(run_folder) / "requeues.json"


def read_requeues(run_folder: str | Path) -> list[dict]:
    """Returns the requeued attempts, oldest first; none if the file is damaged."""
    return peek_record(_requeues_file(run_folder), list[_Requeue]) or []


def record_requeue(run_folder: str | Path, record: dict, guard: WriteGuard = NO_GUARD) -> None:
    """Appends an attempt to ``requeues.json``, if the guard allows it."""
    path = _requeues_file(run_folder)
    records = [*(recover_record(path, list[_Requeue]) or ()), {**record, "time": time.time()}]
    with atomic_write(path, "w", guard) as file:
        json.dump(records, file, indent=1)


def last_requeued(run_folder: str | Path, job_id: str) -> int:
    """Returns the number of a job's last attempt that was requeued; -1 if there is none."""
    names = [path.name for path in slurm_folder(run_folder).glob(f"attempts/{job_id}-*")]
    numbers = [name.removeprefix(f"{job_id}-") for name in names]
    attempts = [int(number) for number in numbers if number.isdecimal()]
    exits = {each: AttemptFolder(run_folder, job_id, each).read("exit") for each in attempts}
    return max((each for each, note in exits.items() if note and note["requeued"]), default=-1)


def last_saved_iteration(run_folder: str | Path) -> int:
    """Returns the iteration of the last checkpoint; -1 if none, 2**62 for the final one."""
    try:
        iteration = iteration_of(last_checkpoint(run_folder).stem)
    except (OSError, ValueError, UserError):
        return -1
    return 2**62 if iteration is None else iteration
