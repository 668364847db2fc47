"""What a job leaves in the ``slurm`` folder of its run.

``lease.json`` names the attempt that owns the run; ``requeues.json`` lists those that a signal
ended; ``attempts/<job>-<restart>`` has, for each attempt, a heartbeat of every rank
(``rank-00000.json``), the stacks of a hung one (``rank-00000.stack``), and notes that are written
once: ``failure.json`` by the rank that failed first, ``exit.json`` by rank 0 when it has decided
how the attempt ends, and ``signalled.json``. Every file is either whole or not there.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from contnet.checkpoint.names import iteration_of, last_checkpoint
from contnet.utils.files import NO_GUARD, WriteGuard, atomic_write

__all__ = [
    "AttemptFolder",
    "last_saved_iteration",
    "lease_file",
    "read_json",
    "read_requeues",
    "record_requeue",
    "slurm_folder",
    "write_json",
]

# A note of another attempt under the same number (a cluster that counts from the beginning again).
_STALE = 300.0


def slurm_folder(run_folder: str | Path) -> Path:
    """Where a run's folder keeps all about its jobs."""
    return Path(run_folder, "slurm")


def lease_file(run_folder: str | Path) -> Path:
    """The file that names the attempt that owns the run."""
    return slurm_folder(run_folder) / "lease.json"


def read_json(path: Path) -> object:
    """A file's content, None if it is not there or cannot be read now."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: object) -> None:
    """Writes a file whole or not at all; not forced to the disk, for heartbeats are many."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


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
        found = [read_json(path) for path in sorted(self.path.glob("rank-*.json"))]
        return {record["rank"]: record for record in found if record}

    def note(self, name: str, record: dict) -> bool:
        """Writes a note that no rank has written yet; whether this was the first."""
        path = self.path / f"{name}.json"
        own = self.path / f"{name}-{record['rank']:05d}.new"
        own.write_text(json.dumps({**record, "time": time.time()}))
        try:
            os.link(own, path)
        except FileExistsError:
            if self.read(name) is not None:
                return False
            os.replace(own, path)
            return True
        finally:
            own.unlink(missing_ok=True)
        return True

    def read(self, name: str, any_age: bool = False) -> dict | None:
        """A note, None if there is none of this attempt."""
        record = read_json(self.path / f"{name}.json")
        if record is None or any_age or record["time"] > self.opened - _STALE:
            return record
        return None


def _requeues_file(run_folder: str | Path) -> Path:
    return slurm_folder(run_folder) / "requeues.json"


def read_requeues(run_folder: str | Path) -> list[dict]:
    """The attempts that a signal ended, the oldest first."""
    return read_json(_requeues_file(run_folder)) or []


def record_requeue(run_folder: str | Path, record: dict, guard: WriteGuard = NO_GUARD) -> None:
    """Appends to them, if the guard lets this process."""
    records = [*read_requeues(run_folder), {**record, "time": time.time()}]
    with atomic_write(_requeues_file(run_folder), "w", guard) as file:
        json.dump(records, file, indent=1)


def last_saved_iteration(run_folder: str | Path) -> int:
    """The iteration of the last complete checkpoint; -1: none; the final one counts as endless."""
    try:
        iteration = iteration_of(last_checkpoint(run_folder).stem)
    except OSError:
        return -1
    return 2**62 if iteration is None else iteration
