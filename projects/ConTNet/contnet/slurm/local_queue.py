"""Runs an array on this machine, without SLURM."""

from __future__ import annotations

import os
import signal
import time

from contnet.slurm.describe import describe_run
from contnet.slurm.executors import submit_jobs
from contnet.slurm.jobs import end_local, live_states
from contnet.slurm.records import add_submission
from contnet.slurm.runs import Run
from contnet.slurm.submission import Submission
from contnet.utils.errors import UserError

__all__ = ["run_queue"]


def _start(plan: Submission, run: Run, slot: int) -> dict:
    """Starts a run, whose record it returns."""
    (job_id,) = submit_jobs(plan.local_executor(slot), [plan.job(run)])
    record = plan.record(job_id, run.folder)
    add_submission(run.folder, record)
    print(f"{run.arguments.name}: started, process {job_id}", flush=True)
    return record


def run_queue(plan: Submission) -> bool:
    """Runs an array on this machine, some runs at a time; stays until all have ended.

    Returns:
        Whether all have finished.

    Raises:
        UserError: if the user, or ``--cancel``, has ended it.
    """
    waiting = plan.pending
    running: dict[int, tuple[Run, dict]] = {}  # by slot, which stands for GPUs
    names = {run.arguments.name: "" for run in plan.runs}
    add_submission(plan.base, plan.record(str(os.getpid()), plan.base, names))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # by --cancel
    try:
        while waiting or running:
            for slot in sorted(set(range(plan.parallel)) - set(running))[: len(waiting)]:
                run = waiting.pop(0)
                running[slot] = (run, _start(plan, run, slot))
            time.sleep(1)
            for slot, (run, record) in list(running.items()):
                if not live_states(record):
                    del running[slot]
                    print(f"{run.arguments.name}: {describe_run(run.folder)}", flush=True)
    except KeyboardInterrupt:
        end_local([record for _, record in running.values()])
        raise UserError("interrupted: the runs that were going on are cancelled") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    return all(describe_run(run.folder) == "finished" for run in plan.runs)
