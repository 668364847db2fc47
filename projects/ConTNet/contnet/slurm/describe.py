"""Describes the status of submitted runs."""

from __future__ import annotations

import codecs
import os
import time
from pathlib import Path

from contnet.checkpoint.names import FINAL
from contnet.engine.writers import METRICS_FILE, read_metrics
from contnet.slurm.jobs import live_states
from contnet.slurm.records import last_submission, open_log, read_submissions
from contnet.slurm.status import read_status
from contnet.utils.errors import UserError
from contnet.utils.files import explain_os_error
from contnet.utils.records import warn_once
from contnet.utils.text import printable_lines, say

__all__ = ["describe_run", "follow", "iterations_done", "last_metrics", "print_status"]

# Bytes at the end of a log that are read for its last lines.
_TAIL = 100_000
# Prefix of messages that need no traceback.
_OUR_ERROR = f"{UserError.__name__}: "


def last_metrics(folder: str | Path) -> dict:
    """Returns the latest line of a training's metrics; {} if there is none."""
    return next((line for line in reversed(read_metrics(folder)) if "total_loss" in line), {})


def iterations_done(folder: str | Path) -> int:
    """Returns the number of iterations that a run has done, by its job and metrics.json."""
    status = read_status(folder) if Path(folder).is_dir() else {}
    return max(status.get("iteration", -1), last_metrics(folder).get("iteration", -1)) + 1


def _status_of_last(folder: str | Path, record: dict) -> dict:
    """Returns a run's status if it is from the job of the last submission; {} otherwise."""
    status = read_status(folder) if Path(folder).is_dir() else {}
    return status if status.get("job_id") == record.get("job_id", status.get("job_id")) else {}


def _read_log(path: str | Path, place: int) -> tuple[bytes, int]:
    """Returns a log from a position on, and its end; b"" if it cannot be read.

    Args:
        path: path of the log, as in :func:`contnet.slurm.records.open_log`.
        place: position in bytes; if negative, from the end.
    """
    try:
        if file := open_log(path):
            with file:
                end = file.seek(0, os.SEEK_END)
                file.seek(place if place >= 0 else max(0, end + place))
                return file.read(), file.tell()
    except OSError as error:
        warn_once(f"{path} cannot be read ({explain_os_error(error, path)})")
    return b"", place


def _last_words(record: dict, lines: int = 10) -> list[str]:
    """Returns the last lines of a job without heartbeats, of its log or its set-up."""
    for path in (record["log"], Path(record["job_folder"], "setup.log")):
        if text := _read_log(path, -_TAIL)[0].decode(errors="replace").strip():
            return text.splitlines()[-lines:]
    return []


def describe_run(folder: str | Path, state: str = "") -> str:
    """Describes the state of a run in a few words.

    Args:
        folder: folder of the run.
        state: SLURM's state, if its job has not ended.
    """
    if state:
        return state.lower()
    record = (read_submissions(folder) or [{}])[-1]
    status = _status_of_last(folder, record)
    if status.get("state", "finished") == "finished" and (
        status or Path(folder, f"{FINAL}.pth").exists()
    ):
        return "finished"
    exit_note = status.get("exit") or {}
    if "cancelled" in record:
        return f"cancelled{': ' * bool(exit_note)}{exit_note.get('reason', '')}"
    if failure := status.get("failure"):
        reason = " ".join(failure["reason"].removeprefix(_OUR_ERROR).split())
        return f"failed: {reason} (rank {failure['rank']})"
    if exit_note and exit_note["requeued"]:
        return (
            "ended without a message when it should have restarted; before that: "
            f"{exit_note['reason']}"
        )
    if exit_note:
        return f"stopped: {exit_note['reason']}"
    if status:
        return f"ended without a message, last update {_ago(status['age'])}"
    if Path(folder, METRICS_FILE).exists():
        return "not finished"
    return "never started"


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _print_run(folder: Path, record: dict, state: str) -> None:
    status = _status_of_last(folder, record)
    say(f"run      {folder}")
    say(
        f"job      {record['job_id']} on {record['cluster']}, submitted {record['time']} from "
        f"{record['host']}, {record['nodes']} x {record['tasks']} processes"
    )
    described = describe_run(folder, state)
    say(f"state    {described}")
    if status.get("max_iter"):
        say(
            f"progress iteration {status['iteration'] + 1} of {status['max_iter']}, attempt "
            f"{status['restart'] + 1}, last update {_ago(status['age'])}"
        )
    metrics = last_metrics(folder)
    if metrics:
        say(f"loss     {metrics['total_loss']:.4g} at iteration {metrics['iteration']}")
    for each in status.get("requeues", ()):
        say(f"requeued at iteration {each['iteration'] + 1}: {each['reason']}")
    failure = status.get("failure")
    told = "cancelled" in record or (failure and failure["reason"].startswith(_OUR_ERROR))
    if failure and failure.get("details") and not told:
        say(*failure["details"].splitlines())
    if not status and not state and described != "finished" and (words := _last_words(record)):
        say(*words)
    say(f"log      {record['log']}")


def print_status(folder: str | Path) -> None:
    """Prints the status of a run folder's job, or of the jobs of a sweep's folder.

    Raises:
        UserError: if nothing was submitted from the folder, or SLURM does not respond.
    """
    record = last_submission(folder)
    states = live_states(record)
    if not record["runs"]:
        _print_run(Path(folder), record, states.get(record["job_id"], ""))
        return
    say(f"sweep    {folder}, job {record['job_id']} on {record['cluster']}, {record['time']}")
    width = max(map(len, record["runs"]))
    for name, job_id in record["runs"].items():
        run = Path(folder, name)
        state = _state_of_run(run, job_id, states)
        job = f"  job {job_id}" if job_id else ""
        done = iterations_done(run)
        say(f"{name:{width}}{job}  iteration {done}  {describe_run(run, state)}")


def _state_of_run(run: Path, job_id: str, states: dict[str, str]) -> str:
    if job_id in states:
        return states[job_id]
    records = read_submissions(run)
    return next(iter(live_states(records[-1]).values()), "") if records else ""


def follow(folder: str | Path, poll: float = 5.0) -> bool:
    """Prints the log of a run's job as it grows, until the job ends or Ctrl-C is pressed.

    For the folder of a sweep, prints each change of a run's state instead.

    Args:
        folder: folder of the run or sweep.
        poll: seconds between two checks of the job's state.

    Returns:
        Whether all runs have finished.
    """
    try:
        return _follow(folder, poll)
    except KeyboardInterrupt:
        say("", f"no longer following; the job continues, cancel it with --cancel {folder}")
        raise


class _Tail:
    """Prints what is added to a file."""

    def __init__(self, path: str):
        self.path = path
        self.place = 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self) -> None:
        data, self.place = _read_log(self.path, self.place)
        print(printable_lines(self.decoder.decode(data)), end="", flush=True)


def _follow(folder: str | Path, poll: float) -> bool:
    record = last_submission(folder)
    runs = {name: Path(folder, name) for name in record["runs"]} or {"": Path(folder)}
    seen: dict[str, str] = {}
    tail = None if record["runs"] else _Tail(record["log"])
    while True:
        states = live_states(record)
        described = {
            name: describe_run(run, states.get(record["runs"].get(name, record["job_id"]), ""))
            for name, run in runs.items()
        }
        until = time.monotonic() + (poll if states else 0)
        while True:
            if tail:
                tail.show()
            if time.monotonic() >= until:
                break
            time.sleep(min(0.5, poll))
        for name, text in described.items():
            if seen.get(name) != text:
                say(f"[{time.strftime('%H:%M:%S')}] {name or record['job_id']}: {text}")
        seen = described
        if not states:
            return all(text == "finished" for text in described.values())
