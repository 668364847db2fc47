"""What has been submitted from a run folder: records, and how the jobs do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from contnet.engine.writers import METRICS_FILE
from contnet.slurm.nodes import ask_slurm, read_states
from contnet.slurm.status import read_status
from contnet.utils.errors import UserError
from contnet.utils.files import atomic_write

__all__ = [
    "add_submission",
    "cancel",
    "check_free",
    "describe_run",
    "end_local",
    "follow",
    "iterations_done",
    "last_metrics",
    "last_submission",
    "live_states",
    "print_status",
    "process_start",
    "read_submissions",
    "slurm_folder",
]

SUBMISSION_FILE = "submission.json"
# What stands before messages that say all; others come with a traceback.
_OUR_ERROR = f"{UserError.__name__}: "
# Seconds that processes of this machine have to save and end.
_PATIENCE = 30


# --- records -------------------------------------------------------------------------------------


def slurm_folder(folder: str | Path) -> Path:
    """Where a run folder keeps everything about its jobs."""
    return Path(folder, "slurm")


def read_submissions(folder: str | Path) -> list[dict]:
    """The records of submission.json, oldest first; none if there is no such file.

    Raises:
        UserError: if it does not hold records.
    """
    path = slurm_folder(folder) / SUBMISSION_FILE
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text())
        if all(isinstance(each["job_id"], str) and each["cluster"] for each in records):
            return records
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path} does not hold records of submissions: move it away")


def last_submission(folder: str | Path) -> dict:
    """The newest record.

    Raises:
        UserError: if there is none.
    """
    records = read_submissions(folder)
    if not records:
        raise UserError(
            f"{folder} has no slurm/{SUBMISSION_FILE}: nothing was submitted from this folder"
        )
    return records[-1]


def add_submission(folder: str | Path, record: dict) -> None:
    """Appends a record to submission.json."""
    slurm_folder(folder).mkdir(parents=True, exist_ok=True)
    _write_submissions(folder, [*read_submissions(folder), record])


def _write_submissions(folder: str | Path, records: Sequence[dict]) -> None:
    with atomic_write(slurm_folder(folder) / SUBMISSION_FILE, "w") as file:
        json.dump(records, file, indent=1)


# --- jobs ----------------------------------------------------------------------------------------


def process_start(number: int) -> str:
    """When a process of this machine started, in ticks since the machine did; "" if it is gone."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _is_alive(record: dict) -> bool:
    """Whether the process of a local submission is there, and not another of its number."""
    start = process_start(int(record["job_id"]))
    return bool(start) and start == record["process_start"]


def live_states(record: dict) -> dict[str, str]:
    """The jobs of a submission that have not ended, with SLURM's name of their state.

    Raises:
        UserError: if SLURM does not answer, or the job runs on another machine without SLURM.
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
            f"run folder {folder} is in use by job {name} ({state}): wait, or end it by "
            f"--cancel {folder}, or choose another OUTPUT_DIR"
        )


def _may_save(record: dict) -> bool:
    """Whether a job of this machine has anything to lose yet."""
    status = read_status(record["run_folder"])
    return status.get("job_id") == record["job_id"] and status["state"] == "running"


def _wait_while(condition: Callable[[], bool], seconds: float) -> None:
    """Returns when a condition no longer holds, or after so many seconds."""
    until = time.monotonic() + seconds
    while condition() and time.monotonic() < until:
        time.sleep(0.05)


def end_local(records: Sequence[dict]) -> None:
    """Ends jobs of this machine: those that train save first, if the time allows."""
    alive = [record for record in records if _is_alive(record)]
    for record in alive:
        os.kill(int(record["job_id"]), signal.SIGTERM)  # submitit's controller passes it on
    _wait_while(lambda: any(map(_is_alive, filter(_may_save, alive))), _PATIENCE)
    for record in alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(record["job_id"]), signal.SIGKILL)  # it leads a group of its own
    _wait_while(lambda: any(map(_is_alive, alive)), 5)


def _end_sweep(record: dict) -> None:
    """Ends the process that starts the runs of a sweep here, which then ends those."""
    os.kill(int(record["job_id"]), signal.SIGTERM)
    _wait_while(lambda: _is_alive(record), _PATIENCE + 10)
    folders = [Path(record["run_folder"], name) for name in record["runs"]]
    end_local([each for folder in folders for each in read_submissions(folder)[-1:]])


def _mark_cancelled(folder: str | Path) -> None:
    records = read_submissions(folder)
    if records:
        records[-1]["cancelled"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        _write_submissions(folder, records)


def cancel(folder: str | Path) -> None:
    """Ends the jobs of a run folder, or of the folder of a sweep, and says which.

    Raises:
        UserError: if there is none to end.
    """
    record = last_submission(folder)
    states = live_states(record)
    if not states:
        raise UserError(f"nothing to cancel: job {record['job_id']} has ended")
    runs = {Path(folder, name): job_id for name, job_id in record["runs"].items()}
    if record["cluster"] == "slurm":
        ask_slurm("scancel", record["job_id"])
        marked = [run for run, job_id in runs.items() if job_id in states]
    elif record["host"] != socket.gethostname():
        raise UserError(f"job {record['job_id']} runs on {record['host']}: cancel it there")
    else:
        marked = [run for run in runs if any(map(_is_alive, read_submissions(run)[-1:]))]
        _end_sweep(record) if runs else end_local([record])
    for each in (folder, *marked):
        _mark_cancelled(each)
    for name, state in states.items():
        print(f"cancelled job {name} (it was {state})")


# --- what can be told ----------------------------------------------------------------------------


def last_metrics(folder: str | Path) -> dict:
    """The newest line of metrics.json, {} if there is none."""
    path = Path(folder, METRICS_FILE)
    if not path.exists():
        return {}
    for line in reversed(path.read_text().splitlines()):
        try:
            metrics = json.loads(line)
        except ValueError:  # half written
            continue
        if "total_loss" in metrics:
            return metrics
    return {}


def iterations_done(folder: str | Path) -> int:
    """How many iterations a run has done, as its job or else metrics.json says."""
    status = read_status(folder) if Path(folder).is_dir() else {}
    return max(status.get("iteration", -1), last_metrics(folder).get("iteration", -1)) + 1


def _status_of_last(folder: str | Path, record: dict) -> dict:
    """What the job of a run's last submission has left; {} if it did not come to that."""
    status = read_status(folder) if Path(folder).is_dir() else {}
    return status if status.get("job_id") == record.get("job_id", status.get("job_id")) else {}


def _last_words(record: dict, lines: int = 10) -> str:
    """What a job said that ended before Python did: its set-up, or SLURM."""
    for path in (Path(record["log"]), Path(record["job_folder"], "start.log")):
        if path.exists() and (text := path.read_text(errors="replace").strip()):
            return "\n".join(text.splitlines()[-lines:])
    return ""


def describe_run(folder: str | Path, state: str = "") -> str:
    """The state of a run in a few words.

    Args:
        folder: of the run.
        state: SLURM's, if its job has not ended.
    """
    if state:
        return state.lower()
    record = (read_submissions(folder) or [{}])[-1]
    status = _status_of_last(folder, record)
    if status.get("state", "finished") == "finished" and (
        status or Path(folder, "model_final.pth").exists()
    ):
        return "finished"
    leave = status.get("leave") or {}
    if "cancelled" in record:
        return f"cancelled{': ' * bool(leave)}{leave.get('reason', '')}"
    if death := status.get("death"):
        reason = " ".join(death["reason"].removeprefix(_OUR_ERROR).split())
        return f"failed: {reason} (rank {death['rank']})"
    if leave and leave["requeued"]:
        return f"ended without a word when it was to start again; before that: {leave['reason']}"
    if leave:
        return f"stopped: {leave['reason']}"
    if status:
        return f"ended without a word, last sign of life {_ago(status['age'])}"
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
    print(f"run      {folder}")
    print(
        f"job      {record['job_id']} on {record['cluster']}, submitted {record['time']} from "
        f"{record['host']}, {record['nodes']} x {record['tasks']} processes"
    )
    described = describe_run(folder, state)
    print(f"state    {described}")
    if status.get("max_iter"):
        print(
            f"progress iteration {status['iteration'] + 1} of {status['max_iter']}, start number "
            f"{status['restart'] + 1}, last sign of life {_ago(status['age'])}"
        )
    metrics = last_metrics(folder)
    if metrics:
        print(f"loss     {metrics['total_loss']:.4g} at iteration {metrics['iteration']}")
    for each in status.get("requeues", ()):
        print(f"requeued at iteration {each['iteration'] + 1}: {each['reason']}")
    death = status.get("death")
    told = "cancelled" in record or (death and death["reason"].startswith(_OUR_ERROR))
    if death and death.get("details") and not told:
        print(death["details"])
    if not status and not state and described != "finished" and (words := _last_words(record)):
        print(words)
    print(f"log      {record['log']}")


def print_status(folder: str | Path) -> None:
    """Prints how the job of a run folder does, or those of a sweep's folder.

    Raises:
        UserError: if nothing was submitted from the folder, or SLURM does not answer.
    """
    record = last_submission(folder)
    states = live_states(record)
    if not record["runs"]:
        _print_run(Path(folder), record, states.get(record["job_id"], ""))
        return
    print(f"sweep    {folder}, job {record['job_id']} on {record['cluster']}, {record['time']}")
    width = max(map(len, record["runs"]))
    for name, job_id in record["runs"].items():
        run = Path(folder, name)
        state = _state_of_run(run, job_id, states)
        job = f"  job {job_id}" if job_id else ""
        done = iterations_done(run)
        print(f"{name:{width}}{job}  iteration {done}  {describe_run(run, state)}")


def _state_of_run(run: Path, job_id: str, states: dict[str, str]) -> str:
    if job_id in states:
        return states[job_id]
    records = read_submissions(run)
    return next(iter(live_states(records[-1]).values()), "") if records else ""


def follow(folder: str | Path, poll: float = 5.0) -> bool:
    """Prints the log of a run's job as it grows, until the job has ended or the user leaves.

    For the folder of a sweep, prints each change of a run's state instead.

    Args:
        folder: of the run or sweep.
        poll: seconds between two looks at the job's state.

    Returns:
        Whether all that was run has finished.
    """
    try:
        return _follow(folder, poll)
    except KeyboardInterrupt:
        print(f"\nno longer following; the job goes on, end it by --cancel {folder}")
        return True


class _Tail:
    """Prints what is added to a file."""

    def __init__(self, path: Path):
        self.path = path
        self.place = 0

    def show(self) -> None:
        if self.path.exists():
            with open(self.path, errors="replace") as file:
                file.seek(self.place)
                print(file.read(), end="", flush=True)
                self.place = file.tell()


def _follow(folder: str | Path, poll: float) -> bool:
    record = last_submission(folder)
    runs = {name: Path(folder, name) for name in record["runs"]} or {"": Path(folder)}
    seen: dict[str, str] = {}
    tail = None if record["runs"] else _Tail(Path(record["log"]))
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
                print(
                    f"[{time.strftime('%H:%M:%S')}] {name or record['job_id']}: {text}", flush=True
                )
        seen = described
        if not states:
            return all(text == "finished" for text in described.values())
