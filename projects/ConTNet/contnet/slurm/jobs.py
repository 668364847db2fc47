"""States of submitted jobs, and their cancellation."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from contnet.slurm.client import ask_slurm, read_states
from contnet.slurm.records import last_submission, read_submissions, write_submissions
from contnet.slurm.status import read_status
from contnet.utils.errors import UserError
from contnet.utils.processes import process_environment, process_start
from contnet.utils.text import say

__all__ = ["RUN_VARIABLE", "cancel", "check_free", "end_local", "live_states"]

# Environment variable of all processes of a local run: its folder.
RUN_VARIABLE = "CONTNET_RUN_FOLDER"
# Seconds that processes on this machine have to save and end.
_PATIENCE = 30


def _is_alive(record: dict) -> bool:
    """Whether the process of a local submission is running, and not another one with its id.

    The process of an array does not have :data:`RUN_VARIABLE`; it ends its runs itself.
    """
    start = process_start(record["job_id"])
    if not start or start != record.get("process_start"):
        return False
    mark = process_environment(record["job_id"]).get(RUN_VARIABLE)
    return bool(record["runs"]) or mark == os.path.realpath(record["run_folder"])


def live_states(record: dict) -> dict[str, str]:
    """Returns the jobs of a submission that have not ended, with SLURM's names of their states.

    Without SLURM, a job on another machine counts as running while its heartbeats are recent.

    Raises:
        UserError: if SLURM does not respond.
    """
    job_id = record["job_id"]
    if record["cluster"] == "slurm":
        states = read_states([job_id])
        return {
            name: state
            for name, state in states.items()
            if name == job_id or name.startswith(f"{job_id}_")
        }
    if record["host"] != socket.gethostname():
        status = read_status(record["run_folder"])
        if status.get("state") in ("starting", "running") and status["age"] < 120:
            return {job_id: f"RUNNING on {record['host']}"}
        return {}
    return {job_id: "RUNNING"} if _is_alive(record) else {}


def check_free(folder: str | Path) -> None:
    """Raises UserError if a job that has not ended uses a run folder."""
    records = read_submissions(folder)
    states = live_states(records[-1]) if records else {}
    if states:
        name, state = next(iter(states.items()))
        raise UserError(
            f"run folder {folder} is in use by job {name} ({state}): wait, cancel it with "
            f"--cancel {folder}, or choose another OUTPUT_DIR"
        )


def _may_save(record: dict) -> bool:
    """Whether a job on this machine is running, so that it saves before it ends."""
    status = read_status(record["run_folder"])
    return status.get("job_id") == record["job_id"] and status["state"] == "running"


def _wait_while(condition: Callable[[], bool], seconds: float) -> None:
    """Waits while a condition holds, at most this many seconds."""
    until = time.monotonic() + seconds
    while condition() and time.monotonic() < until:
        time.sleep(0.05)


def end_local(records: Sequence[dict]) -> None:
    """Ends jobs on this machine; running trainings have :data:`_PATIENCE` seconds to save."""
    alive = [record for record in records if _is_alive(record)]
    for record in alive:
        os.kill(int(record["job_id"]), signal.SIGTERM)  # submitit's controller passes it on
    _wait_while(lambda: any(map(_is_alive, filter(_may_save, alive))), _PATIENCE)
    for record in alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(record["job_id"]), signal.SIGKILL)  # it leads its own process group
    _wait_while(lambda: any(map(_is_alive, alive)), 5)


def _end_sweep(record: dict) -> None:
    """Waits until the process of a cancelled sweep on this machine has ended its runs.

    Raises:
        UserError: if the process does not end.
    """
    _wait_while(lambda: _is_alive(record), _PATIENCE + 10)
    folders = [Path(record["run_folder"], name) for name in record["runs"]]
    end_local([each for folder in folders for each in read_submissions(folder)[-1:]])
    if _is_alive(record):
        raise UserError(
            f"process {record['job_id']} does not belong to this run, or hangs: its runs have "
            "ended, kill it if it is yours"
        )


def _check_submitted(record: dict) -> None:
    """Raises UserError unless SLURM's job was submitted from the run's folder."""
    scripts = ask_slurm(
        "squeue", "--noheader", f"--jobs={record['job_id']}", "--states=all", "--format=%o"
    )
    folder = os.path.realpath(record["job_folder"])
    if any(os.path.dirname(os.path.realpath(line)) != folder for line in scripts.splitlines()):
        raise UserError(
            f"job {record['job_id']} was not submitted from {record['run_folder']}: to cancel "
            f"it, use scancel {record['job_id']}"
        )


def _mark_cancelled(folder: str | Path) -> None:
    records = read_submissions(folder)
    if records:
        records[-1]["cancelled"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_submissions(folder, records)


def cancel(folder: str | Path) -> None:
    """Cancels the jobs of a run folder or of a sweep's folder, and prints which.

    Raises:
        UserError: if there is no job to cancel, or it runs on another machine without SLURM.
    """
    record = last_submission(folder)
    states = live_states(record)
    if not states and record["cluster"] == "local" and process_start(record["job_id"]):
        raise UserError(
            f"nothing to cancel: process {record['job_id']} does not belong to this run"
        )
    if not states:
        raise UserError(f"nothing to cancel: job {record['job_id']} has ended")
    runs = {Path(folder, name): job_id for name, job_id in record["runs"].items()}
    if record["cluster"] == "slurm":
        _check_submitted(record)
        ask_slurm("scancel", record["job_id"])
        marked = [run for run, job_id in runs.items() if job_id in states]
    elif record["host"] != socket.gethostname():
        raise UserError(f"job {record['job_id']} runs on {record['host']}: cancel it there")
    else:
        marked = [run for run in runs if any(map(_is_alive, read_submissions(run)[-1:]))]
        if runs:
            _mark_cancelled(folder)
            _end_sweep(record)
        else:
            end_local([record])
    for each in (folder, *marked):
        _mark_cancelled(each)
    for name, state in states.items():
        say(f"cancelled job {name} (it was {state})")
