"""One start of a job, in one of its tasks.

A start that was signalled ends with ``scontrol requeue``, which we call ourselves once the
checkpoint is on the disk. submitit's own way runs inside the signal handler of one rank, before the
ranks can save anything together, and counts requeues by how long a start has run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from functools import partial
from threading import Lock

import torch
from detectron2.engine import DefaultTrainer

from contnet.launch.arguments import configure, parse_arguments
from contnet.launch.distributed import launch_run
from contnet.launch.main import run
from contnet.launch.preflight import check_run, count_processes
from contnet.slurm.attempt_folder import StartFolder, last_saved, read_requeues, record_requeue
from contnet.slurm.cluster import LOCAL_REQUEUE_STATUS, Job, find_job
from contnet.slurm.job import TrainingJob
from contnet.slurm.lease import Lease
from contnet.slurm.preemption import Leave, prepare_trainer
from contnet.slurm.watcher import Watcher, lost_contact
from contnet.utils.errors import UserError
from contnet.utils.files import guard_writes

__all__ = ["Start"]

# Exit status of a process that SIGTERM ended.
_TERMINATED = 143
# Seconds in which SLURM tells of a task that was killed, on a node that lives.
_NODE_SILENCE = 40


def _find_job(run_folder: str) -> Job:
    job = find_job()
    if job.cluster != "local":
        return job
    earlier = [record["job_id"] for record in read_requeues(run_folder)].count(job.job_id)
    return replace(job, restart=earlier)


class Start:
    """Runs a job's training in this task, and decides at the end whether it goes on.

    Args:
        settings: of the job.
    """

    def __init__(self, settings: TrainingJob):
        self.settings = settings
        self.job = _find_job(settings.run_folder)
        self.folder = StartFolder(settings.run_folder, self.job.job_id, self.job.restart)
        self.lease = Lease(settings.run_folder, self.job)
        self.metrics = {}
        self._lock = Lock()
        self.watcher = Watcher(
            self.job,
            self.folder,
            self.lease,
            hang_timeout=settings.hang_timeout,
            grace=0.75 * settings.setup.get("signal_delay", 90),
            beat=max(settings.setup.get("beat", 5), self.job.world_size / 16),
            abandon=self._abandon,
        )

    def run(self) -> dict:
        """See :class:`TrainingJob`."""
        self.watcher.start()
        try:
            self._begin()
            self._train()
        except Leave:
            self._leave()
        except BaseException as error:
            if lost_contact(error) and self._node_is_gone():
                sys.exit(self._end("a node does not answer any more"))
            self.watcher.fail(error)
            raise
        self.watcher.finish("finished")
        if self.job.rank == 0:
            self.lease.release()
        return self.metrics

    def _node_is_gone(self) -> bool:
        """On rank 0, whether others are gone in a way that SLURM has not noticed.

        It takes minutes to notice a dead node, and would call the job failed if this process ended
        before. A rank that failed has said so; of one that was killed SLURM knows.
        """
        if self.job.cluster != "slurm" or os.environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
            return False
        end = time.monotonic() + _NODE_SILENCE + (10 if self.job.rank else 0)
        while time.monotonic() < end:
            if self.watcher.signals or self.folder.read("death"):
                return False
            time.sleep(0.2)
        return self.job.rank == 0

    def _begin(self) -> None:
        if self.job.restart > self.settings.max_requeues:
            raise UserError(
                f"job {self.job.job_id} has been started {self.job.restart + 1} times and may be "
                f"requeued {self.settings.max_requeues} times: submit it again to go on"
            )
        guard_writes(self.folder.path.name, self.watcher.check_lease)
        self.watcher.check_lease()
        if self.job.rank == 0:
            self.lease.take(patience=12 * self.watcher.beat)
        if self.settings.interface:
            for library in ("NCCL", "GLOO"):
                os.environ[f"{library}_SOCKET_IFNAME"] = self.settings.interface

    def _train(self) -> None:
        args = parse_arguments(self.settings.argv)
        args.resume = args.resume or self.job.restart > 0
        cfg = DefaultTrainer.auto_scale_workers(configure(args), count_processes(args))
        check_run(cfg, args)
        if args.eval_only:
            self.watcher.enter("evaluation")
        # Longer than the watcher waits, who can say more about a hang.
        timeout = self.settings.hang_timeout + 60
        launch_run(self._function, args, torch.device(cfg.MODEL.DEVICE).type, timeout)

    def _function(self, args: argparse.Namespace) -> None:
        self.metrics = run(args, partial(prepare_trainer, watcher=self.watcher))

    def _leave(self) -> None:
        """After the checkpoint: rank 0 decides, the others wait for its word."""
        if self.job.rank == 0:
            status = self._end(f"saved after iteration {self.watcher.iteration}")
        else:
            status = self._await_end()
        self.watcher.finish("left")
        note = self.folder.read("leave") or {"reason": ""}
        if status == 1:
            raise UserError(note["reason"])
        sys.exit(status)

    def _await_end(self) -> int:
        while (note := self.folder.read("leave")) is None:
            time.sleep(0.2)  # the watcher ends this process if rank 0 dies
        return note["status"] if note["status"] != LOCAL_REQUEUE_STATUS else 0

    def _abandon(self, reason: str) -> int:
        """On rank 0, in the watcher's thread: the training loop cannot be waited for."""
        return 1 if self.folder.read("death") else self._end(reason)

    def _end(self, reason: str) -> int:
        """Requeues the job if it may go on; notes the decision; returns the exit status."""
        with self._lock:
            if note := self.folder.read("leave"):
                return note["status"]
            status, outcome = self._requeue(reason)
            self.folder.note(
                "leave",
                {
                    "rank": 0,
                    "iteration": self.watcher.iteration,
                    "requeued": status in (0, LOCAL_REQUEUE_STATUS),
                    "reason": f"{reason}; {outcome}",
                    "status": status,
                },
            )
            return status

    def _requeue(self, reason: str) -> tuple[int, str]:
        state = self.job.state()
        if state != "RUNNING":
            # Cancelled, requeued or preempted: what comes next is SLURM's affair.
            return _TERMINATED, f"not requeued by us, for the job is {state or 'unknown to SLURM'}"
        if self.job.cluster == "local" and "SIGUSR2" not in self.watcher.signals:
            # By --cancel, or by whoever ends a process of this machine.
            return _TERMINATED, "not requeued, for the processes were told to end"
        if error := self._reason_to_stop():
            return 1, error
        record = {
            "job_id": self.job.job_id,
            "restart": self.job.restart,
            "iteration": last_saved(self.settings.run_folder),
            "reason": reason,
        }
        record_requeue(self.settings.run_folder, record)
        try:
            self.job.requeue()
        except UserError as error:
            return 1, str(error)
        return (LOCAL_REQUEUE_STATUS if self.job.cluster == "local" else 0), "requeued"

    def _reason_to_stop(self) -> str:
        if self.job.restart >= self.settings.max_requeues:
            return f"not requeued: this was requeue {self.job.restart}, the last one allowed"
        earlier = [
            record
            for record in read_requeues(self.settings.run_folder)
            if record["job_id"] == self.job.job_id
        ]
        if earlier and last_saved(self.settings.run_folder) <= earlier[-1]["iteration"]:
            return (
                "not requeued: nothing was saved since the last requeue, after iteration "
                f"{earlier[-1]['iteration']}; give the job more time, or save more often"
            )
        return ""
