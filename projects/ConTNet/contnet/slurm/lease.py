"""What a job leaves in the ``slurm`` folder of its run.

``lease.json`` names the start that owns the run; ``requeues.json`` lists those that a signal ended;
``starts/<job>-<restart>`` has, for each start, a heartbeat of every rank (``rank-00000.json``), the
stacks of a hung one (``rank-00000.stack``), and notes that are written once: ``death.json`` by the
rank that failed first, ``leave.json`` by rank 0 when it has decided how the start ends, and
``signalled.json``. Every file is either whole or not there.
"""

from __future__ import annotations

import time
from pathlib import Path

from contnet.slurm.attempt_folder import (
    StartFolder,
    _write_json,
    read_json,
)
from contnet.slurm.client import job_state
from contnet.slurm.cluster import Job
from contnet.utils.errors import UserError

__all__ = ["Lease"]


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
