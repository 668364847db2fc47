"""Executors that submit jobs with submitit, to SLURM or on this machine."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from submitit import LocalExecutor, LocalJob, SlurmExecutor
from submitit.core.utils import FailedJobError

from contnet.slurm.settings import ClusterSettings
from contnet.utils.errors import UserError

__all__ = ["DetachedExecutor", "local_executor", "sbatch_text", "slurm_executor", "submit_jobs"]

# submitit's own limit of requeues after timeouts must never apply: the job counts its requeues.
_UNBOUNDED = 10**9
_TEN_YEARS_IN_MINUTES = 10 * 365 * 24 * 60
# submitit's own command would start the tasks at most six times, whatever the limit is.
_CONTROLLER = (
    "import sys; from pathlib import Path; from submitit.local.local import Controller; "
    "Controller(Path(sys.argv[1])).run(max_retry=int(sys.argv[2]))"
)


class _SlurmExecutor(SlurmExecutor):
    @classmethod
    def affinity(cls) -> int:
        return 2  # Also without SLURM, for --dry-run.


class DetachedExecutor(LocalExecutor):
    """Runs tasks on this machine; they continue when the terminal is closed.

    Args:
        folder: folder for pickles and logs; the output of ``setup`` goes to ``setup.log``.
        environment: environment variables of the tasks, in addition to this process's own.
        setup: shell commands before the start.
        python: the command that starts Python.
        attempts: maximum number of starts of the tasks, the first one and requeues.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        setup: Sequence[str],
        python: str,
        attempts: int,
    ):
        super().__init__(folder, max_num_timeout=_UNBOUNDED, python=python)
        self.environment = dict(environment)
        self.setup = list(setup)
        self.attempts = attempts

    def _submit_command(self, command: str) -> LocalJob:
        tasks = self.parameters["tasks_per_node"]
        minutes = self.parameters["timeout_min"]
        environment = {
            **os.environ,
            **self.environment,
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_NTASKS": str(tasks),
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(int(60 * minutes)),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(self.parameters["signal_delay_s"]),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
        }
        controller = [sys.executable, "-c", _CONTROLLER, str(self.folder), str(self.attempts)]
        script = "\n".join([*self.setup, f"exec {shlex.join(controller)}"])
        with open(self.folder / "setup.log", "ab") as log:
            process = subprocess.Popen(
                ["bash", "-c", script],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        tasks_ids = list(range(tasks))
        return LocalJob(self.folder, str(process.pid), tasks=tasks_ids, process=process)


def _guarded(command: str) -> str:
    """Returns a set-up command whose failure ends the job."""
    message = shlex.quote(f"the set-up command failed: {command}")
    return f"{{\n{command}\n}} || {{ echo {message} >&2; exit 1; }}"


def _setup(environment: Mapping[str, str], settings: ClusterSettings) -> list[str]:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return [*exports, *map(_guarded, settings.setup)]


def _python(settings: ClusterSettings, python: str) -> str:
    return f"{settings.container} {python}".strip()


def slurm_executor(
    folder: Path,
    settings: ClusterSettings,
    *,
    name: str,
    nodes: int,
    tasks: int,
    gpus: int,
    environment: Mapping[str, str],
    python: str,
    parallel: int,
) -> SlurmExecutor:
    """Returns submitit's executor for SLURM; nothing is written before it submits.

    Args:
        folder: folder for pickles and logs. It does not depend on the job's id, because SLURM
            opens the log when a job starts, perhaps before submitit has created such a folder.
        settings: settings of the cluster.
        name: name of the job.
        nodes: number of nodes.
        tasks: processes per node.
        gpus: GPUs per node; 0 for a job on CPUs.
        environment: environment variables that are exported before the start.
        python: the command that starts Python.
        parallel: maximum number of runs of an array at a time.
    """
    executor = _SlurmExecutor(folder, max_num_timeout=_UNBOUNDED, python=_python(settings, python))
    optional = {
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "exclude": settings.exclude,
        "mem": f"{math.ceil(1024 * settings.mem_gb)}M" if settings.mem_gb else "",
        "cpus_per_task": settings.cpus_per_gpu,
        "gpus_per_node": f"{settings.gpu_type}:{gpus}" if gpus and settings.gpu_type else gpus,
    }
    # Since SLURM 22.05, srun does not inherit --cpus-per-task from sbatch.
    cores = [f"--cpus-per-task={settings.cpus_per_gpu}"] if settings.cpus_per_gpu else []
    more = [f"--{k}" if v is True else f"--{k}={v}" for k, v in settings.srun.items()]
    executor.update_parameters(
        job_name=name,
        nodes=nodes,
        ntasks_per_node=tasks,
        time=max(1, math.ceil(60 * settings.timeout_hours)),
        signal_delay_s=settings.signal_delay,
        setup=_setup(environment, settings),
        srun_args=["--kill-on-bad-exit=1", *cores, *more],
        stderr_to_stdout=True,
        wckey=None,
        array_parallelism=parallel,
        additional_parameters={
            "requeue": True,
            **{key.replace("-", "_"): value for key, value in settings.sbatch.items()},
        },
        **{key: value for key, value in optional.items() if value},
    )
    return executor


def local_executor(
    folder: Path,
    settings: ClusterSettings,
    *,
    tasks: int,
    gpus: Sequence[str],
    environment: Mapping[str, str],
    python: str,
) -> DetachedExecutor:
    """Returns the executor for this machine; creates its folder.

    Args:
        folder: folder for pickles and logs.
        settings: set-up commands, container, times, and maximum number of requeues.
        tasks: number of processes.
        gpus: GPUs that the tasks may use, as in CUDA_VISIBLE_DEVICES.
        environment: environment variables of the tasks.
        python: the command that starts Python.
    """
    executor = DetachedExecutor(
        folder,
        {**environment, "CUDA_VISIBLE_DEVICES": ",".join(gpus)},
        list(map(_guarded, settings.setup)),
        _python(settings, python),
        attempts=settings.max_requeues + 1,
    )
    executor.update_parameters(
        nodes=1,
        tasks_per_node=tasks,
        timeout_min=60 * settings.timeout_hours or _TEN_YEARS_IN_MINUTES,
        signal_delay_s=settings.signal_delay,
    )
    return executor


def sbatch_text(executor: SlurmExecutor, runs: int) -> str:
    """Returns the script that sbatch would get, for a single run or an array of runs."""
    if runs > 1:
        executor.parameters["map_count"] = runs
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit_jobs(executor: SlurmExecutor | DetachedExecutor, jobs: Sequence) -> list[str]:
    """Submits callables, several as one array, and returns their job ids.

    Raises:
        UserError: if sbatch rejects the job; with its message.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints the error, too
            return [job.job_id for job in executor.submit_array(jobs)]
    except FailedJobError as error:
        said = " ".join(str(error).replace("sbatch: error:", "").split()) or "it gave no reason"
        raise UserError(f"sbatch refused the job: {said}") from error
