"""Runs an array on this machine, without SLURM."""

from __future__ import annotations

import contextlib
import os
import time

from contnet.slurm.describe import describe_run
from contnet.slurm.executors import submit_jobs
from contnet.slurm.jobs import end_local, live_states
from contnet.slurm.records import add_submission, last_submission
from contnet.slurm.runs import Run
from contnet.slurm.submission import Submission
from contnet.utils.text import say

__all__ = ["run_queue"]


def _start(plan: Submission, run: Run, slot: int, running: dict[int, tuple[Run, dict]]) -> None:
    """Starts a run in a slot, and adds it to ``running``."""
    (job_id,) = submit_jobs(plan.local_executor(run, slot), [plan.job(run)])
    record = plan.record(job_id, run.folder)
    running[slot] = (run, record)  # at once: an interrupt ends the runs in it
    add_submission(run.folder, record)
    say(f"{run.arguments.name}: started, process {job_id}")


def run_queue(plan: Submission) -> bool:
    """Runs an array on this machine, some runs at a time; waits until all have ended.

    A signal or ``--cancel`` ends the runs, too.

    Returns:
        Whether all runs have finished.
    """
    waiting = plan.pending
    running: dict[int, tuple[Run, dict]] = {}  # by slot, which selects the GPUs
    names = {run.arguments.name: "" for run in plan.runs}
    add_submission(plan.base, plan.record(str(os.getpid()), plan.base, names))
    try:
        while waiting or running:
            for slot in sorted(set(range(plan.parallel)) - set(running))[: len(waiting)]:
                _start(plan, waiting.pop(0), slot, running)
            time.sleep(1)
            if "cancelled" in last_submission(plan.base):
                raise KeyboardInterrupt
            for slot, (run, record) in list(running.items()):
                if not live_states(record):
                    del running[slot]
                    say(f"{run.arguments.name}: {describe_run(run.folder)}")
    except KeyboardInterrupt:
        end_local([record for _, record in running.values()])
        with contextlib.suppress(OSError):  # the reader of the output may have ended, too
            print("the active runs are cancelled", flush=True)
        raise
    return all(describe_run(run.folder) == "finished" for run in plan.runs)
