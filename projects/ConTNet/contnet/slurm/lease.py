"""The lease of a run's folder: which attempt of which job may write into it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from contnet.slurm.attempt_folder import (
    AttemptFolder,
    lease_file,
    read_json,
    write_json,
)
from contnet.slurm.client import job_state
from contnet.slurm.cluster import Job
from contnet.utils.errors import UserError
from contnet.utils.files import TEMPORARY_SUFFIX, WriteGuard

__all__ = ["Lease", "LeaseLost"]


class LeaseLost(BaseException):
    """A later attempt owns the run, so this one must end; no error of the training."""


class Lease(WriteGuard):
    """Says which attempt of which job may write into a run's folder.

    SLURM starts a job again when it loses touch with a node, whose tasks may live on; the later
    attempt takes the lease, and the earlier one, which asks before each file, ends.

    Args:
        run_folder: of the run.
        job: this attempt.
    """

    def __init__(self, run_folder: str | Path, job: Job):
        self.run_folder = Path(run_folder)
        self.path = lease_file(run_folder)
        self.job = job
        self.writer = AttemptFolder(run_folder, job.job_id, job.restart).path.name
        self._held = False

    def _ours(self, lease: dict) -> bool:
        return (lease["job_id"], lease["restart"]) == (self.job.job_id, self.job.restart)

    def lost(self) -> bool:
        """Whether another attempt owns the run now; True also if a later one did before us."""
        lease = read_json(self.path)
        if lease is None:
            return False
        if self._ours(lease):
            self._held = True
            return False
        later = lease["job_id"] == self.job.job_id and lease["restart"] > self.job.restart
        return self._held or later

    def check(self) -> None:
        """Raises LeaseLost if another attempt owns the run."""
        if self.lost():
            raise LeaseLost(f"a later attempt of the job owns {self.run_folder}")

    def remove_unfinished(self) -> None:
        """Deletes what this attempt has half written; the later one did so before it trained."""
        for path in self.run_folder.glob(f"*.{self.writer}{TEMPORARY_SUFFIX}"):
            with contextlib.suppress(OSError):  # it has no other name, and nobody reads it
                path.unlink()

    def take(self, timeout: float) -> None:
        """Takes the lease, from another job only once that has ended.

        Args:
            timeout: seconds without a heartbeat after which another job counts as ended.

        Raises:
            UserError: if the other job is alive.
        """
        begun = time.time()
        while not self._free(timeout):
            if time.time() - begun > timeout:
                owner = read_json(self.path) or {}
                raise UserError(
                    f"{self.run_folder} belongs to job {owner.get('job_id')}, which is alive: "
                    "cancel that job, or choose another OUTPUT_DIR"
                )
            time.sleep(1)
        self._write(released=False)

    def _free(self, timeout: float) -> bool:
        lease = read_json(self.path)
        if lease is None or lease["released"] or lease["job_id"] == self.job.job_id:
            return True
        if self.job.cluster == lease["cluster"] == "slurm":
            return job_state(lease["job_id"]) not in ("RUNNING", "COMPLETING", "SUSPENDED")
        ranks = AttemptFolder(self.run_folder, lease["job_id"], lease["restart"]).ranks()
        signs = [lease["time"], *(rank["time"] for rank in ranks.values())]
        return time.time() - max(signs) > timeout

    def release(self) -> None:
        """At the end of the job, so that the next one need not wait."""
        if not self.lost():
            self._write(released=True)

    def _write(self, released: bool) -> None:
        write_json(
            self.path,
            {
                "cluster": self.job.cluster,
                "job_id": self.job.job_id,
                "restart": self.job.restart,
                "released": released,
                "time": time.time(),
            },
        )
