"""Calls SLURM's commands."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterable

from contnet.utils.errors import UserError

__all__ = ["SHORT_TIMEOUT", "ask_slurm", "job_state", "read_states"]

# Seconds for a question that a job asks about itself.
SHORT_TIMEOUT = 20
# States of jobs that have ended.
_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "REVOKED",
    "TIMEOUT",
}


def ask_slurm(*command: str, timeout: float = 120) -> str:
    """Runs a SLURM command, and returns its output.

    Args:
        command: the program and its arguments.
        timeout: timeout in seconds.

    Raises:
        UserError: if the program does not exist, or fails; with SLURM's message.
    """
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} is not on PATH: is SLURM installed on this machine?")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="backslashreplace", timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{command[0]} did not respond within {timeout:g} s, try again later"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = "; ".join(line.strip() for line in lines[-2:]) or f"status {done.returncode}"
        raise UserError(f"{command[0]} failed: {said}")
    return done.stdout


def read_states(job_ids: Iterable[str]) -> dict[str, str]:
    """Returns SLURM's states of jobs, separately for tasks of arrays; ended jobs are not included.

    Args:
        job_ids: ids such as ``12`` or ``12_3``; the states of all tasks of an array are returned.
    """
    states = {}
    for job_id in dict.fromkeys(each.partition("_")[0] for each in job_ids):
        try:
            answer = ask_slurm(
                "squeue", "--noheader", "--array", f"--jobs={job_id}", "--format=%i|%T|%r"
            )
        except UserError as error:
            if "Invalid job id" not in str(error):
                raise
            continue
        for line in answer.splitlines():
            name, state, reason = (part.strip() for part in (line + "||").split("|")[:3])
            if name and state not in _ENDED:
                states[name] = f"{state} ({reason})" if state == "PENDING" and reason else state
    return states


def job_state(job_id: str) -> str:
    """Returns SLURM's name of a job's state; "" if it is unknown or SLURM does not respond."""
    for attempt in range(3):
        try:
            return ask_slurm(
                *("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "-o%T"),
                timeout=SHORT_TIMEOUT,
            ).strip()
        except UserError as error:
            if "Invalid job id" in str(error):
                return ""
            time.sleep(attempt)
    return ""
