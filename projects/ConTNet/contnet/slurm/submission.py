"""A submission: its plan, its files, and sending it."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from contnet.engine.resume_file import make_last
from contnet.engine.run_record import COMMIT_VARIABLE, git_commit
from contnet.slurm.attempt_folder import slurm_folder
from contnet.slurm.describe import follow
from contnet.slurm.executors import local_executor, slurm_executor, submit_jobs
from contnet.slurm.job import TrainingJob, python_command
from contnet.slurm.jobs import RUN_VARIABLE
from contnet.slurm.records import add_submission
from contnet.slurm.runs import Run
from contnet.slurm.settings import ClusterSettings
from contnet.slurm.snapshot import list_code, take_snapshot
from contnet.utils.errors import UserError
from contnet.utils.files import SET_ASIDE, atomic_write, explain_os_error
from contnet.utils.processes import process_start
from contnet.utils.text import say

__all__ = ["Submission", "next_folder", "send", "write_files"]


@dataclass
class Submission:
    """The plan of a submission, before anything is written."""

    args: argparse.Namespace
    settings: ClusterSettings
    cluster: str
    base: Path
    runs: list[Run]
    folder: Path  # of this submission, below base/slurm
    command: list[str]

    @property
    def is_array(self) -> bool:
        return bool(self.runs[0].arguments.name)

    @property
    def pending(self) -> list[Run]:
        """Runs that have not finished."""
        return [run for run in self.runs if not run.finished]

    @property
    def gpus(self) -> int:
        """GPUs on each node."""
        return 0 if self.runs[0].cfg.MODEL.DEVICE == "cpu" else self.args.num_gpus

    @property
    def parallel(self) -> int:
        """Maximum number of runs at a time."""
        number = len(self.pending)
        return min(self.args.max_parallel or (1 if self.cluster == "local" else number), number)

    @property
    def code(self) -> str:
        """Path of the code, for PYTHONPATH."""
        code = list_code()
        return str((code.root if self.args.no_snapshot else self.folder / "code") / code.path)

    @property
    def job_name(self) -> str:
        """Name of the job in SLURM."""
        return self.base.name if self.is_array else Path(self.runs[0].arguments.config_file).stem

    def config_file(self, run: Run) -> Path:
        """Returns the path of the full config of a run."""
        return self.folder / f"{run.arguments.name or 'config'}.yaml"

    def job(self, run: Run) -> TrainingJob:
        """Returns the callable that runs in every task."""
        return TrainingJob(
            config_file=str(self.config_file(run)),
            run_folder=str(run.folder),
            num_gpus=self.args.num_gpus,
            resume=run.settings.resume,
            eval_only=run.settings.eval_only,
            notes=run.settings.notes,
            max_requeues=self.settings.max_requeues,
            hang_timeout=self.settings.hang_timeout,
            interface=self.settings.interface,
            signal_delay=self.settings.signal_delay,
        )

    def environment(self) -> dict[str, str]:
        """Returns the job's environment variables. Relative paths become absolute."""
        datasets = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
        paths = [self.code, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        return {
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in paths if path),
            # Otherwise a package in the folder where the job starts would precede the snapshot.
            "PYTHONSAFEPATH": "1",
            "DETECTRON2_DATASETS": os.path.abspath(datasets),
            COMMIT_VARIABLE: git_commit(),
        }

    def python(self) -> str:
        """Returns the command that starts Python."""
        words = shlex.split(python_command())
        return shlex.join([self.settings.python or words[0], *words[1:]])

    def slurm_executor(self):
        """Returns submitit's SLURM executor, with all settings."""
        return slurm_executor(
            self.folder,
            self.settings,
            name=self.job_name,
            nodes=self.args.num_machines,
            tasks=self.args.num_gpus,
            gpus=self.gpus,
            environment=self.environment(),
            python=self.python(),
            parallel=self.parallel,
        )

    def local_executor(self, run: Run, slot: int = 0):
        """Returns the executor for a run on this machine; ``slot`` numbers parallel runs."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
            str(index) for index in range(torch.cuda.device_count() if self.gpus else 0)
        )
        first = slot * self.gpus
        return local_executor(
            self.folder,
            self.settings,
            tasks=self.args.num_gpus,
            gpus=visible.split(",")[first : first + self.gpus] if self.gpus else [],
            environment={**self.environment(), RUN_VARIABLE: os.path.realpath(run.folder)},
            python=self.python(),
        )

    def log(self, job_id: str) -> Path:
        """Returns the path of the log of a job's first task."""
        return self.folder / f"{job_id}_0_log.out"

    def record(self, job_id: str, run_folder: Path, runs: dict[str, str] | None = None) -> dict:
        """Returns the record for submission.json."""
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "cluster": self.cluster,
            "host": socket.gethostname(),
            "job_id": job_id,
            "runs": runs or {},
            "run_folder": str(run_folder),
            "job_folder": str(self.folder),
            "log": str(self.log(job_id)),
            "command": self.command,
            "folder": str(Path.cwd()),
            "git_commit": git_commit(),
            "code": self.code,
            "nodes": self.args.num_machines,
            "tasks": self.args.num_gpus,
            "settings": asdict(self.settings),
            "process_start": process_start(int(job_id)) if self.cluster == "local" else "",
        }


def next_folder(base: Path) -> Path:
    """Returns the folder of the next submission from a run folder."""
    folder = slurm_folder(base)
    numbers = [path.name.removeprefix("submission") for path in folder.glob("submission*")]
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    return folder / f"submission{last + 1}"


def write_files(plan: Submission) -> None:
    """Creates the folder of a submission, with the code and the config of each run.

    Raises:
        UserError: if another submission is in progress, or the folder cannot be created.
    """
    try:
        plan.folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(
            f"another submission into {plan.base} is in progress: wait for it, then try again"
        ) from error
    except OSError as error:
        reason = explain_os_error(error, plan.folder)
        raise UserError(f"{plan.folder} cannot be created ({reason})") from error
    if not plan.args.no_snapshot:
        try:
            take_snapshot(plan.folder / "code")
        except UserError:
            shutil.rmtree(plan.folder)
            raise
    for run in plan.pending:
        run.folder.mkdir(parents=True, exist_ok=True)
        if plan.args.resume_from:  # every attempt of the job resumes from the last one
            make_last(run.folder, plan.args.resume_from)
        with atomic_write(plan.config_file(run), "w") as file:
            file.write(run.cfg.dump())


def _record(plan: Submission, job_ids: Sequence[str]) -> None:
    for run, job_id in zip(plan.pending, job_ids, strict=True):
        add_submission(run.folder, plan.record(job_id, run.folder))
    if plan.is_array:
        names = [run.arguments.name for run in plan.pending]
        first = job_ids[0].partition("_")[0]
        kept = {run.arguments.name: "" for run in plan.runs}
        runs = kept | dict(zip(names, job_ids, strict=True))
        add_submission(plan.base, plan.record(first, plan.base, runs))


def send(plan: Submission) -> bool:
    """Submits the files of :func:`write_files`; returns whether this succeeded."""
    try:
        slurm = plan.cluster == "slurm"
        executor = plan.slurm_executor() if slurm else plan.local_executor(plan.runs[0])
        job_ids = submit_jobs(executor, [plan.job(run) for run in plan.pending])
    except UserError as error:
        shutil.rmtree(plan.folder)
        if not plan.args.resume_from:
            raise
        went_back = (
            f"the run is back at {plan.args.resume_from}, later checkpoints are in {SET_ASIDE}"
        )
        raise UserError(f"{error}; {went_back}") from error
    kind = "job" if plan.cluster == "slurm" else "process"
    number = job_ids[0].partition("_")[0]
    say(f"submitted {kind} {number}; logs in {plan.folder}")
    _record(plan, job_ids)
    say(f"status: python tools/submit.py --status {shlex.quote(str(plan.base))}")
    return not plan.args.watch or follow(plan.base)
