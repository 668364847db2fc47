"""One attempt of a job, in one of its tasks: it starts or resumes the training.

An attempt that was signalled ends with ``scontrol requeue``, which we call ourselves once the
checkpoint is on the disk. submitit's own way runs inside the signal handler of one rank, before the
ranks can save anything together, and counts requeues by how long an attempt has run.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from threading import Lock
from typing import NoReturn

import torch

from contnet.config import load_finished_config
from contnet.data.datasets.register import register_datasets
from contnet.engine.resume_file import ResumeFile, choose_checkpoint
from contnet.launch.arguments import RunSettings
from contnet.launch.distributed import launch_run
from contnet.launch.environment import DistributedEnvironment, Processes
from contnet.launch.preflight import check_run
from contnet.launch.run import run
from contnet.launch.run_lease import LeaseLost
from contnet.slurm.attempt_folder import (
    AttemptFolder,
    last_requeued,
    last_saved_iteration,
    read_requeues,
    record_requeue,
)
from contnet.slurm.cluster import LOCAL_REQUEUE_STATUS, Job
from contnet.slurm.lease import Lease
from contnet.slurm.nccl import leave_failures_to_watcher
from contnet.slurm.preemption import Preempted, Preemption
from contnet.slurm.watcher import Watcher
from contnet.utils.errors import UserError
from contnet.utils.failures import lost_contact
from contnet.utils.files import explaining_disk

__all__ = ["Attempt"]

# Exit status of a process that SIGTERM ended.
_TERMINATED = 143
# Seconds within which SLURM reports a killed task on a node that still responds.
_NODE_SILENCE = 40


def _find_job(env: DistributedEnvironment, run_folder: str) -> Job:
    job = Job.of(env)
    if job.cluster != "local":
        return job
    earlier = [record["job_id"] for record in read_requeues(run_folder)].count(job.job_id)
    # requeues.json may have been damaged, and started anew.
    return replace(job, restart=max(earlier, last_requeued(run_folder, job.job_id) + 1))


class Attempt:
    """Runs a job's training in this task, and decides at the end whether the job is requeued.

    The arguments are those of :class:`contnet.slurm.job.TrainingJob`.
    """

    def __init__(
        self,
        *,
        config_file: str,
        run_folder: str,
        num_gpus: int,
        resume: bool,
        eval_only: bool,
        notes: Sequence[str],
        max_requeues: int,
        hang_timeout: float,
        interface: str,
        signal_delay: float,
        heartbeat_interval: float,
    ):
        self.config_file = config_file
        self.run_folder = run_folder
        self.resume = resume
        self.eval_only = eval_only
        self.notes = notes
        self.max_requeues = max_requeues
        self.hang_timeout = hang_timeout
        self.interface = interface
        self.processes = Processes(num_gpus)
        self.job = _find_job(self.processes.environment, run_folder)
        self.folder = AttemptFolder(run_folder, self.job.job_id, self.job.restart)
        self.lease = Lease(run_folder, self.job)
        self.metrics = {}
        self._lock = Lock()
        self._decision: tuple[int, str] | None = None  # how it ends, if the note cannot be written
        self.watcher = Watcher(
            self.job,
            self.folder,
            self.lease,
            hang_timeout=hang_timeout,
            grace=0.75 * signal_delay,
            heartbeat_interval=max(heartbeat_interval, self.job.world_size / 16),
            abandon=self._abandon,
        )

    def run(self) -> dict:
        """Trains or evaluates, as in ``TrainingJob``; returns the last evaluation's metrics."""
        with explaining_disk(self.run_folder):
            self.watcher.start()
        try:
            self._attempt()
        except LeaseLost:
            self.watcher.end_replaced()
        return self.metrics

    def _attempt(self) -> None:
        try:
            with explaining_disk(self.run_folder):
                status = self._train_or_save()
        except LeaseLost:
            raise
        except BaseException as error:
            if lost_contact(error) and self._node_is_gone():
                sys.exit(self._end("a node does not respond"))
            self.watcher.fail(error)
            raise
        if status is not None:
            self._leave(status)
        self.watcher.finish("finished")
        if self.job.rank == 0:
            self.lease.release()

    def _train_or_save(self) -> int | None:
        """Returns the exit status of a signalled attempt; None if the run has finished."""
        try:
            self._begin()
            self._train()
        except Preempted:  # rank 0 decides, the other ranks wait for it
            if self.job.rank:
                return self._await_end()
            return self._end(f"saved after iteration {self.watcher.iteration}")
        return None

    def _node_is_gone(self) -> bool:
        """On rank 0, whether another rank is gone and SLURM has not noticed it.

        SLURM takes minutes to notice a dead node, and would call the job failed if this process
        ended before. A rank that failed has written a note; SLURM reports one that was killed.
        """
        if self.job.cluster != "slurm" or self.job.num_nodes == 1:
            return False
        end = time.monotonic() + _NODE_SILENCE + (10 if self.job.rank else 0)
        while time.monotonic() < end:
            if self.watcher.signals or self.folder.read("failure"):
                return False
            time.sleep(0.2)
        return self.job.rank == 0

    def _begin(self) -> None:
        if self.job.restart > self.max_requeues:
            raise UserError(
                f"job {self.job.job_id} has been started {self.job.restart + 1} times and may be "
                f"requeued {self.max_requeues} times: submit it again to continue"
            )
        self.lease.check()
        patience = 12 * self.watcher.heartbeat_interval
        if self.job.rank == 0:
            self.lease.take(patience)
        else:
            self.lease.wait(patience + 2 * self.lease.silence)
        if self.interface:
            for library in ("NCCL", "GLOO"):
                os.environ[f"{library}_SOCKET_IFNAME"] = self.interface

    def _settings(self) -> RunSettings:
        """Returns the settings of the run; the submission has finished its config."""
        cfg = load_finished_config(self.config_file)
        size, scaled = self.processes.world_size, cfg.SOLVER.REFERENCE_WORLD_SIZE
        if scaled not in (0, size):
            raise UserError(
                f"{self.config_file} is scaled to {scaled} processes, but the job has {size}: "
                "submit it again"
            )
        register_datasets(cfg)
        resume = self.resume or (self.job.restart > 0 and not self.eval_only)
        return RunSettings(
            cfg,
            resume,
            self.eval_only,
            self.processes,
            self.config_file,
            self.notes,
            checkpoint=choose_checkpoint(cfg.OUTPUT_DIR) if resume else ResumeFile(),
        )

    def _train(self) -> None:
        settings = self._settings()
        settings = check_run(settings)
        if settings.eval_only:
            self.watcher.enter("evaluation")
        device = torch.device(settings.cfg.MODEL.DEVICE).type
        # Longer than the watcher's timeout, since the watcher reports more about a hang.
        timeout = self.hang_timeout + 60
        if device == "cuda":
            leave_failures_to_watcher(self.folder.path, timeout)
        self.metrics = launch_run(self._call_run, settings, self.processes, device, timeout)

    def _call_run(self, settings: RunSettings) -> dict:
        return run(settings, Preemption(self.watcher, self.lease))

    def _leave(self, status: int) -> NoReturn:
        self.watcher.finish("preempted")
        note = self.folder.read("exit") or {"reason": ""}
        if status == 1:
            raise UserError(note["reason"])
        sys.exit(status)

    def _await_end(self) -> int:
        while (note := self.folder.read("exit")) is None:
            time.sleep(0.2)  # the watcher ends this process if rank 0 dies
        return note["status"] if note["status"] != LOCAL_REQUEUE_STATUS else 0

    def _abandon(self, reason: str) -> int:
        """Returns the exit status without the training loop; on rank 0, in the watcher's thread."""
        return 1 if self.folder.read("failure") else self._end(reason)

    def _end(self, reason: str) -> int:
        """Requeues the job if it may continue; records the decision; returns the exit status."""
        with self._lock:
            if note := self.folder.read("exit"):
                return note["status"]
            if self._decision is None:
                status, outcome = self._requeue(reason)
                self._decision = status, f"{reason}; {outcome}"
            status, reason = self._decision
            self.folder.note(
                "exit",
                {
                    "rank": 0,
                    "iteration": self.watcher.iteration,
                    "requeued": status in (0, LOCAL_REQUEUE_STATUS),
                    "reason": reason,
                    "status": status,
                },
            )
            return status

    def _requeue(self, reason: str) -> tuple[int, str]:
        state = self.job.state()
        if state != "RUNNING":
            # Cancelled, requeued or preempted: SLURM decides what happens next.
            return _TERMINATED, f"not requeued by us: the job is {state or 'unknown to SLURM'}"
        if self.job.cluster == "local" and "SIGUSR2" not in self.watcher.signals:
            # By --cancel, or because a user ended the process.
            return _TERMINATED, "not requeued: the processes were told to end"
        if error := self.reason_to_stop():
            return 1, error
        record = {
            "job_id": self.job.job_id,
            "restart": self.job.restart,
            "iteration": last_saved_iteration(self.run_folder),
            "reason": reason,
        }
        record_requeue(self.run_folder, record, self.lease)
        try:
            self.job.requeue()
        except UserError as error:
            return 1, str(error)
        return (LOCAL_REQUEUE_STATUS if self.job.cluster == "local" else 0), "requeued"

    def reason_to_stop(self) -> str:
        """Returns why the job may not be requeued: too many times, or no progress; else ""."""
        if self.job.restart >= self.max_requeues:
            return f"not requeued: this was requeue {self.job.restart}, the last one allowed"
        earlier = [
            record
            for record in read_requeues(self.run_folder)
            if record["job_id"] == self.job.job_id
        ]
        # Not <=: with a larger batch size than before, iteration numbers become lower.
        if earlier and last_saved_iteration(self.run_folder) == earlier[-1]["iteration"]:
            return (
                "not requeued: no checkpoint was saved since the last requeue, after iteration "
                f"{earlier[-1]['iteration']}; give the job more time, or save more often"
            )
        return ""
