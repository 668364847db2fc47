"""The lease of a run's folder for the attempts of a job."""

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
    """Determines which attempt of which job may write into a run's folder.

    SLURM restarts a job when it loses contact with a node, whose tasks may continue to run. The
    later attempt takes the lease; the earlier one checks it before each file, and ends.

    Args:
        run_folder: folder of the run.
        job: this attempt of the job.
    """

    def __init__(self, run_folder: str | Path, job: Job):
        super().__init__(run_folder, job.cluster, job.job_id, job.restart)
        self.writer = AttemptFolder(run_folder, job.job_id, job.restart).path.name

    def remove_unfinished(self) -> None:
        """Deletes the unfinished files of this attempt, as the later one did before training."""
        for path in self.run_folder.glob(f"*.{self.writer}{TEMPORARY_SUFFIX}"):
            with contextlib.suppress(OSError):  # nobody reads an unfinished file
                path.unlink()

    def _is_alive(self, number: int, owner: Owner | None) -> bool | None:
        alive = super()._is_alive(number, owner)
        if alive is False or owner is None or (self.owner.cluster, owner.cluster) != ("slurm",) * 2:
            return alive
        # Tasks on a node that SLURM has given up may still run, but must not write.
        state = "" if owner.job_id == self.owner.job_id else job_state(owner.job_id)
        return state in _ALIVE if state else alive
