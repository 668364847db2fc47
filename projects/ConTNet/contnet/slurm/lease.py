"""The lease of a run's folder as the attempts of a job take it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from contnet.launch.run_lease import Owner, RunLease
from contnet.slurm.attempt_folder import AttemptFolder
from contnet.slurm.client import job_state
from contnet.slurm.cluster import Job
from contnet.utils.files import TEMPORARY_SUFFIX

__all__ = ["Lease"]

_ALIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")


class Lease(RunLease):
    """Says which attempt of which job may write into a run's folder.

    SLURM starts a job again when it loses touch with a node, whose tasks may live on; the later
    attempt takes the lease, and the earlier one, which asks before each file, ends.

    Args:
        run_folder: of the run.
        job: this attempt.
    """

    def __init__(self, run_folder: str | Path, job: Job):
        super().__init__(run_folder, job.cluster, job.job_id, job.restart)
        self.writer = AttemptFolder(run_folder, job.job_id, job.restart).path.name

    def remove_unfinished(self) -> None:
        """Deletes what this attempt has half written; the later one did so before it trained."""
        for path in self.run_folder.glob(f"*.{self.writer}{TEMPORARY_SUFFIX}"):
            with contextlib.suppress(OSError):  # it has no other name, and nobody reads it
                path.unlink()

    def _is_alive(self, number: int, owner: Owner | None) -> bool | None:
        alive = super()._is_alive(number, owner)
        if alive is False or owner is None or (self.owner.cluster, owner.cluster) != ("slurm",) * 2:
            return alive
        # Tasks of a node that SLURM has given up may live on, but not write.
        state = "" if owner.job_id == self.owner.job_id else job_state(owner.job_id)
        return state in _ALIVE if state else alive
