"""What a job leaves in the ``slurm`` folder of its run.

``requeues.json`` lists the attempts that a signal ended; ``attempts/<job>-<restart>`` has, for each
attempt, a heartbeat of every rank
(``rank-00000.json``), the stacks of a hung one (``rank-00000.stack``), and notes that are written
once: ``failure.json`` by the rank that failed first, ``exit.json`` by rank 0 when it has decided
how the attempt ends, and ``signalled.json``. Every file is either whole or not there.
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

# A note of another attempt under the same number (a cluster that counts from the beginning again).
_STALE = 300.0

# The forms of these files. Numbers have bounds, for not-a-number is none.
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
    """Where a run's folder keeps all about its jobs."""
    return Path(run_folder, "slurm")


def _replace(new: Path, path: Path) -> None:
    """Gives a file its name, whatever has that name."""
    if path.is_dir():
        set_aside(path)
    os.replace(new, path)


def write_json(path: Path, value: object) -> None:
    """Writes a file whole or not at all; not forced to the disk, for heartbeats are many."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value))
    _replace(temporary, path)


class AttemptFolder:
    """Heartbeats and notes of one attempt of a job."""

    def __init__(self, run_folder: str | Path, job_id: str, restart: int):
        self.path = slurm_folder(run_folder) / "attempts" / f"{job_id}-{restart:03d}"
        self.opened = time.time()

    def rank_file(self, rank: int, suffix: str) -> Path:
        """Where a rank writes."""
        return self.path / f"rank-{rank:05d}{suffix}"

    def write_heartbeat(self, record: dict) -> None:
        """Replaces the heartbeat of ``record["rank"]``."""
        write_json(self.rank_file(record["rank"], ".json"), {**record, "time": time.time()})

    def ranks(self) -> dict[int, dict]:
        """The last heartbeat of each rank."""
        files = sorted(self.path.glob("rank-*.json"))
        found = [peek_record(path, _Heartbeat) for path in files]
        return {record["rank"]: record for record in found if record}

    def note(self, name: str, record: dict) -> bool:
        """Writes a note that no rank has written yet; whether this was the first."""
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
        """A note, None if there is none of this attempt, or it is damaged."""
        record = peek_record(self.path / f"{name}.json", _NOTES[name])
        if record is None or any_age or record["time"] > self.opened - _STALE:
            return record
        return None


def _requeues_file(run_folder: str | Path) -> Path:
    return slurm_folder(run_folder) / "requeues.json"


def read_requeues(run_folder: str | Path) -> list[dict]:
    """The attempts that a signal ended, the oldest first; none if the file is damaged."""
    return peek_record(_requeues_file(run_folder), list[_Requeue]) or []


def record_requeue(run_folder: str | Path, record: dict, guard: WriteGuard = NO_GUARD) -> None:
    """Appends to them, if the guard lets this process."""
    path = _requeues_file(run_folder)
    records = [*(recover_record(path, list[_Requeue]) or ()), {**record, "time": time.time()}]
    with atomic_write(path, "w", guard) as file:
        json.dump(records, file, indent=1)


def last_requeued(run_folder: str | Path, job_id: str) -> int:
    """The last attempt of a job that has ended to be started again; -1: none."""
    names = [path.name for path in slurm_folder(run_folder).glob(f"attempts/{job_id}-*")]
    numbers = [name.removeprefix(f"{job_id}-") for name in names]
    attempts = [int(number) for number in numbers if number.isdecimal()]
    exits = {each: AttemptFolder(run_folder, job_id, each).read("exit") for each in attempts}
    return max((each for each, note in exits.items() if note and note["requeued"]), default=-1)


def last_saved_iteration(run_folder: str | Path) -> int:
    """The iteration of the last complete checkpoint; -1: none; the final one counts as endless."""
    try:
        iteration = iteration_of(last_checkpoint(run_folder).stem)
    except (OSError, ValueError, UserError):
        return -1
    return 2**62 if iteration is None else iteration
