"""The job of this process: its state, and requeueing it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from contnet.launch.environment import DistributedEnvironment
from contnet.slurm.client import SHORT_TIMEOUT, ask_slurm, job_state
from contnet.utils.errors import UserError

__all__ = ["LOCAL_REQUEUE_STATUS", "Job"]

# Exit status that makes submitit's local executor start the tasks again.
LOCAL_REQUEUE_STATUS = 144


@dataclass(frozen=True)
class Job:
    """An attempt of a job, seen from one of its tasks.

    Attributes:
        cluster: "slurm", "local" (submitit's local executor), or "" for neither.
        job_id: id for SLURM's commands, "12_3" for a task of an array.
        restart: number of earlier attempts of this job.
        rank, world_size: rank of this task, and number of tasks.
        num_nodes: number of machines of the job.
    """

    cluster: str
    job_id: str
    restart: int = 0
    rank: int = 0
    world_size: int = 1
    num_nodes: int = 1

    @classmethod
    def of(cls, env: DistributedEnvironment) -> Job:
        """Returns the job of a process; outside a cluster, one named after the process id."""
        return cls(
            env.cluster,
            env.job_id or f"process{os.getpid()}",
            env.restart,
            env.rank,
            env.world_size,
            env.num_nodes,
        )

    def state(self) -> str:
        """Returns SLURM's name of the job's state, "" if unknown; without SLURM, RUNNING."""
        return job_state(self.job_id) if self.cluster == "slurm" else "RUNNING"

    def requeue(self) -> None:
        """Makes SLURM end this attempt and start another; the local executor uses our exit status.

        Raises:
            UserError: if the cluster does not requeue the job.
        """
        if self.cluster == "local":
            return
        if not self.cluster:
            raise UserError("without SLURM, nothing can restart the training")
        try:
            ask_slurm("scontrol", "requeue", self.job_id, timeout=SHORT_TIMEOUT)
        except UserError as error:
            raise UserError(f"SLURM did not requeue job {self.job_id}: {error}") from error
