"""Finds the rank and the job of this process.

torchrun, SLURM's srun (with or without submitit) and submitit's local executor start all processes
themselves and set environment variables. Only these are read; ``scontrol`` is not called.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from contnet.utils.errors import UserError

__all__ = ["DistributedEnvironment", "Processes", "find_environment", "first_host"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
_LOCAL = ("SUBMITIT_LOCAL_JOB_ID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_GLOBALID")


@dataclass(frozen=True)
class DistributedEnvironment:
    """A process's place in a run, and its job, from environment variables.

    Attributes:
        launcher: launcher of all processes of the run: "torchrun", "slurm" or "local" (submitit's
            local executor); "" for a single process, or one that will start the others.
        rank, world_size: rank and number of processes.
        local_rank, local_size: rank and number of processes on this machine.
        host: name of rank 0's machine; "" under torchrun, which has its own rendezvous.
        attempt: unique name of this attempt of the run; "" under torchrun.
        cluster: "slurm" or "local" for a process in a job, otherwise "".
        job_id: id for SLURM's commands, "12_3" for a task of an array; "" outside a job.
        restart: number of earlier attempts of the job. Always 0 with the local executor.
        num_nodes: number of machines of the job.
    """

    launcher: str = ""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = ""
    attempt: str = ""
    cluster: str = ""
    job_id: str = ""
    restart: int = 0
    num_nodes: int = 1


def _need(environ: Mapping[str, str], names: tuple[str, ...], sign: str) -> list[str]:
    if missing := [name for name in names if name not in environ]:
        raise UserError(
            f"{sign} is set, but {', '.join(missing)} is not: unset {sign}, or set all of "
            f"{', '.join(names)}"
        )
    return [environ[name] for name in names]


def first_host(nodes: str) -> str:
    """Returns the first host of a list in SLURM's notation, such as ``gpu[07-09,12],login1``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}, which contains no machine")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _torchrun(environ: Mapping[str, str]) -> DistributedEnvironment:
    values = _need(environ, _TORCHRUN, "RANK")
    rank, world_size, local_rank, local_size = map(int, values[:4])
    return DistributedEnvironment("torchrun", rank, world_size, local_rank, local_size)


def _slurm(environ: Mapping[str, str]) -> DistributedEnvironment:
    sign = "SLURM_STEP_ID" if "SLURM_STEP_ID" in environ else "SLURM_STEP_NUM_TASKS"
    job, step, tasks, nodes, per_node, rank, local_rank = _need(environ, _SLURM, sign)
    rank, world_size, local_rank = int(rank), int(tasks), int(local_rank)
    if world_size == 1:  # includes a shell that srun has opened
        return DistributedEnvironment()
    sizes = {int(size) for size in re.findall(r"(\d+)(?:\(x\d+\))?", per_node)}
    if len(sizes) > 1:
        raise UserError(
            f"SLURM placed {per_node} tasks per node: request the same number on each with "
            "--ntasks-per-node"
        )
    (local_size,) = sizes
    if local_rank != rank % local_size:
        raise UserError(
            "SLURM distributed the tasks cyclically over the nodes: start them with "
            "--distribution=block"
        )
    attempt = f"{job}.{step}.{environ.get('SLURM_RESTART_COUNT', '0')}"
    # Two clusters on the same machines may use the same job ids; srun's port tells them apart.
    if srun := environ.get("SLURM_STEP_LAUNCHER_PORT"):
        attempt += f".{srun}"
    return DistributedEnvironment(
        "slurm", rank, world_size, local_rank, local_size, first_host(nodes), attempt
    )


def _local(environ: Mapping[str, str]) -> DistributedEnvironment:
    job, tasks, rank = _need(environ, _LOCAL, "SUBMITIT_EXECUTOR local")
    if tasks == "1":
        return DistributedEnvironment()
    # Restarts need no number: the executor is the parent of the tasks of all attempts, and starts
    # an attempt only after the tasks of the earlier one have ended.
    rank, tasks = int(rank), int(tasks)
    return DistributedEnvironment("local", rank, tasks, rank, tasks, "127.0.0.1", f"{job}.0.0")


def _is_local(environ: Mapping[str, str]) -> bool:
    return environ.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_JOB_ID" in environ


def _find_place(environ: Mapping[str, str]) -> DistributedEnvironment:
    """Finds the process's place in a run."""
    if "RANK" in environ:
        return _torchrun(environ)
    if _is_local(environ):
        return _local(environ)
    if "SLURM_STEP_ID" in environ or "SLURM_STEP_NUM_TASKS" in environ:
        return _slurm(environ)
    return DistributedEnvironment()


def _find_job(environ: Mapping[str, str]) -> dict[str, object]:
    """Finds the job's fields of a :class:`DistributedEnvironment`."""
    if _is_local(environ):
        return {"cluster": "local", "job_id": environ["SUBMITIT_LOCAL_JOB_ID"]}
    if "SLURM_JOB_ID" not in environ:
        return {}
    job_id = environ["SLURM_JOB_ID"]
    # The last task of an array has the array's id, which SLURM's commands apply to all tasks.
    if "SLURM_ARRAY_JOB_ID" in environ:
        job_id = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return {
        "cluster": "slurm",
        "job_id": job_id,
        "restart": int(environ.get("SLURM_RESTART_COUNT", 0)),
        "num_nodes": int(environ.get("SLURM_STEP_NUM_NODES", 1)),
    }


def find_environment(environ: Mapping[str, str] = os.environ) -> DistributedEnvironment:
    """Reads the environment of this process.

    In a shell inside an allocation (salloc, or ``srun --pty``) no launcher is found: commands there
    start their own processes.

    Raises:
        UserError: if some of the variables are missing, or Detectron2's local process groups do not
            support the distribution of the tasks.
    """
    return replace(_find_place(environ), **_find_job(environ))


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as requested or as started by a launcher.

    Attributes:
        num_gpus: processes on each machine.
        num_machines, machine_rank, dist_url: as in Detectron2's launcher.
        environment: environment of this process, which overrides the others if a launcher has
            started all processes.
    """

    num_gpus: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"
    environment: DistributedEnvironment = field(default_factory=find_environment)

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        started = self.environment
        return started.world_size if started.launcher else self.num_gpus * self.num_machines
