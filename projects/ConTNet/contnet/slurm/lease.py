"""What a job leaves in the ``slurm`` folder of its run.

``lease.json`` names the start that owns the run; ``requeues.json`` lists those that a signal ended;
``starts/<job>-<restart>`` has, for each start, a heartbeat of every rank (``rank-00000.json``), the
stacks of a hung one (``rank-00000.stack``), and notes that are written once: ``death.json`` by the
rank that failed first, ``leave.json`` by rank 0 when it has decided how the start ends, and
``signalled.json``. Every file is either whole or not there.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from contnet.slurm.cluster import Job, job_state
from contnet.utils.errors import UserError
from contnet.utils.files import atomic_write

__all__ = ["Lease", "StartFolder", "last_saved", "read_json", "read_requeues", "record_requeue"]

# A note of another start under the same number (a cluster that counts from the beginning again).
_STALE = 300.0


def read_json(path: Path):
    """A file's content, None if it is not there or cannot be read now."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value: object) -> None:
    """For heartbeats: whole or not there, but not forced to the disk each time."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


class StartFolder:
    """Heartbeats and notes of one start of a job."""

    def __init__(self, run_folder: str | Path, job_id: str, restart: int):
        self.path = Path(run_folder, "slurm", "starts", f"{job_id}-{restart:03d}")
        self.opened = time.time()

    def rank_file(self, rank: int, suffix: str) -> Path:
        return self.path / f"rank-{rank:05d}{suffix}"

    def beat(self, record: dict) -> None:
        """Replaces the heartbeat of ``record["rank"]``."""
        _write_json(self.rank_file(record["rank"], ".json"), {**record, "time": time.time()})

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
        """A note, None if there is none of this start."""
        record = read_json(self.path / f"{name}.json")
        if record is None or any_age or record["time"] > self.opened - _STALE:
            return record
        return None


class Lease:
    """Says which start of which job may write into a run's folder.

    SLURM starts a job again when it loses touch with a node, whose tasks may live on; the later
    start takes the lease, and the earlier one, which asks before each file, ends.

    Args:
        run_folder: of the run.
        job: this start.
    """

    def __init__(self, run_folder: str | Path, job: Job):
        self.run_folder = Path(run_folder)
        self.path = self.run_folder / "slurm" / "lease.json"
        self.job = job
        self._held = False

    def _ours(self, lease: dict) -> bool:
        return (lease["job_id"], lease["restart"]) == (self.job.job_id, self.job.restart)

    def lost(self) -> bool:
        """Whether another start owns the run now; True also if a later one did before us."""
        lease = read_json(self.path)
        if lease is None:
            return False
        if self._ours(lease):
            self._held = True
            return False
        later = lease["job_id"] == self.job.job_id and lease["restart"] > self.job.restart
        return self._held or later

    def take(self, patience: float) -> None:
        """Takes the lease, from another job only once that has ended.

        Args:
            patience: seconds without a heartbeat after which another job counts as ended.

        Raises:
            UserError: if the other job is alive.
        """
        begun = time.time()
        while not self._free(patience):
            if time.time() - begun > patience:
                owner = read_json(self.path) or {}
                raise UserError(
                    f"{self.run_folder} belongs to job {owner.get('job_id')}, which is alive: "
                    "cancel that job, or choose another OUTPUT_DIR"
                )
            time.sleep(1)
        self._write(released=False)

    def _free(self, patience: float) -> bool:
        lease = read_json(self.path)
        if lease is None or lease["released"] or lease["job_id"] == self.job.job_id:
            return True
        if self.job.cluster == lease["cluster"] == "slurm":
            return job_state(lease["job_id"]) not in ("RUNNING", "COMPLETING", "SUSPENDED")
        ranks = StartFolder(self.run_folder, lease["job_id"], lease["restart"]).ranks()
        beats = [lease["time"], *(rank["time"] for rank in ranks.values())]
        return time.time() - max(beats) > patience

    def release(self) -> None:
        """At the end of the job, so that the next one need not wait."""
        if not self.lost():
            self._write(released=True)

    def _write(self, released: bool) -> None:
        _write_json(
            self.path,
            {
                "cluster": self.job.cluster,
                "job_id": self.job.job_id,
                "restart": self.job.restart,
                "released": released,
                "time": time.time(),
            },
        )


def _requeues_file(run_folder: str | Path) -> Path:
    return Path(run_folder, "slurm", "requeues.json")


def read_requeues(run_folder: str | Path) -> list[dict]:
    """The starts that a signal ended, the oldest first."""
    return read_json(_requeues_file(run_folder)) or []


def record_requeue(run_folder: str | Path, record: dict) -> None:
    """Appends to them."""
    records = [*read_requeues(run_folder), {**record, "time": time.time()}]
    with atomic_write(_requeues_file(run_folder), "w") as file:
        json.dump(records, file, indent=1)


def last_saved(run_folder: str | Path) -> int:
    """The iteration of the last complete checkpoint; -1: none; the final one counts as endless."""
    try:
        name = Path(run_folder, "last_checkpoint").read_text().strip()
    except OSError:
        return -1
    digits = name.removeprefix("model_").removesuffix(".pth")
    return int(digits) if digits.isdigit() else 2**62
