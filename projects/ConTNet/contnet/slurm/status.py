"""Reads the status of a run's job from the run's folder."""

from __future__ import annotations

import time
from pathlib import Path

from contnet.launch.run_lease import newest_lease
from contnet.slurm.attempt_folder import AttemptFolder, read_requeues

__all__ = ["read_status"]

# Missing heartbeats after which an attempt counts as silent.
_MISSED = 6


def _state(ranks: dict[int, dict], failure: dict | None, exit_note: dict | None, age: float) -> str:
    main = ranks.get(0, {})
    if failure:
        return "failed"
    if exit_note:
        return "requeued" if exit_note["requeued"] else "stopped"
    if main.get("ended") == "finished":
        return "finished"
    if age > _MISSED * main.get("heartbeat_interval", 10):
        return "silent"
    return "running" if main.get("phase", "starting") != "starting" else "starting"


def _with_silent_ranks(failure: dict, ranks: dict[int, dict]) -> dict:
    """Attributes a failure to the rank that fell silent first, if the other only lost contact."""
    silent = sorted((r["time"], rank) for rank, r in ranks.items() if not r["ended"])
    if not failure.get("lost") or not silent:
        return failure
    rank = ranks[silent[0][1]]
    reason = (
        f"rank {rank['rank']} (process {rank['pid']} on {rank['host']}) ended without a message: "
        f"killed, perhaps out of memory? Rank {failure['rank']} reported: {failure['reason']}"
    )
    return {**failure, "rank": rank["rank"], "reason": reason}


def read_status(run_folder: str | Path) -> dict:
    """Returns the state of a run's last attempt.

    Returns:
        ``{}`` if no job has run here, or the run was started without a job since; otherwise

        - cluster ("slurm", "local"), job_id, restart (from 0): the last attempt;
        - state: "starting", "running", "requeued", "stopped" (a signal ended it and it was not
          requeued: ``exit`` says why), "finished", "failed" (``failure`` says why), or "silent" (no
          heartbeat for long, and no reason either: killed as a whole, or its node is gone);
        - iteration, max_iter: the last one completed by rank 0 (-1: none), and the total (0: not
          known yet);
        - age: seconds since the freshest heartbeat;
        - ranks: by rank, {"time", "age", "host", "pid", "phase", "iteration", "ended", ...};
        - failure: None, or {"rank", "iteration", "phase", "reason", "details", "time"} of the rank
          that failed first;
        - exit: None, or {"requeued", "reason", "iteration", "time"};
        - requeues: those of all jobs of the run so far, each {"job_id", "restart", "iteration",
          "reason", "time"};
        - folder: folder of heartbeats and stacks.
    """
    newest = newest_lease(run_folder)
    if newest is None:
        return {}
    owner, beat = newest
    attempt = AttemptFolder(run_folder, owner.job_id, owner.restart)
    if not attempt.path.exists():
        return {}
    ranks = attempt.ranks()
    now = time.time()
    for record in ranks.values():
        record["age"] = now - record["time"]
    age = min((record["age"] for record in ranks.values()), default=now - beat)
    failure, exit_note = attempt.read("failure", any_age=True), attempt.read("exit", any_age=True)
    main = ranks.get(0, {})
    return {
        "cluster": owner.cluster,
        "job_id": owner.job_id,
        "restart": owner.restart,
        "state": _state(ranks, failure, exit_note, age),
        # The note is newer than the last heartbeat.
        "iteration": (exit_note or main).get("iteration", -1),
        "max_iter": main.get("max_iter", 0),
        "age": age,
        "ranks": ranks,
        "failure": failure and _with_silent_ranks(failure, ranks),
        "exit": exit_note,
        "requeues": read_requeues(run_folder),
        "folder": str(attempt.path),
    }
