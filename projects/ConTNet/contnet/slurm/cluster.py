"""The job that this process belongs to, and what its cluster can be asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from contnet.slurm.client import SHORT_TIMEOUT, ask_slurm, job_state
from contnet.utils.errors import UserError

__all__ = ["LOCAL_REQUEUE_STATUS", "Job", "find_job"]

# The exit status by which submitit's local executor knows that it shall start the tasks again.
LOCAL_REQUEUE_STATUS = 144


@dataclass(frozen=True)
class Job:
    """An attempt of a job, seen from one of its tasks.

    Attributes:
        cluster: "slurm", "local" (submitit's local executor), or "" for neither.
        job_id: as SLURM's commands take it, "12_3" for a task of an array.
        restart: attempts of this job before this one.
        rank, world_size: of this task.
    """

    cluster: str
    job_id: str
    restart: int = 0
    rank: int = 0
    world_size: int = 1

    def state(self) -> str:
        """SLURM's word for the job's state, "" if it gives none; elsewhere RUNNING."""
        return job_state(self.job_id) if self.cluster == "slurm" else "RUNNING"

    def requeue(self) -> None:
        """Has SLURM end this attempt and begin another; the local executor goes by our exit status.

        Raises:
            UserError: if the cluster cannot or will not.
        """
        if self.cluster == "local":
            return
        if not self.cluster:
            raise UserError("nothing here can start the training again")
        try:
            ask_slurm("scontrol", "requeue", self.job_id, timeout=SHORT_TIMEOUT)
        except UserError as error:
            raise UserError(f"SLURM does not requeue job {self.job_id}: {error}") from error


def find_job(environ: Mapping[str, str] = os.environ) -> Job:
    """The job of this process. A local job's restart is 0: its executor does not count."""
    if environ.get("SUBMITIT_EXECUTOR") == "local":
        return Job(
            "local",
            environ["SUBMITIT_LOCAL_JOB_ID"],
            rank=int(environ["SUBMITIT_LOCAL_GLOBALID"]),
            world_size=int(environ["SUBMITIT_LOCAL_NTASKS"]),
        )
    if "SLURM_JOB_ID" not in environ:
        return Job("", f"process{os.getpid()}")
    job_id = environ["SLURM_JOB_ID"]
    # The last task of an array has the array's own number, which would stand for all of them.
    if "SLURM_ARRAY_JOB_ID" in environ:
        job_id = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return Job(
        "slurm",
        job_id,
        restart=int(environ.get("SLURM_RESTART_COUNT", 0)),
        rank=int(environ.get("SLURM_PROCID", 0)),
        world_size=int(environ.get("SLURM_STEP_NUM_TASKS", 1)),
    )
