"""What a run's folder says about its job."""

from __future__ import annotations

from pathlib import Path

__all__ = ["read_status"]


def read_status(run_folder: str | Path) -> dict:
    """The state of a run's last start.

    Returns:
        ``{}`` if no job has run here; otherwise
        job_id, restart: of the last start (SLURM_RESTART_COUNT);
        state: "starting", "running", "requeued", "stopped", "finished", "failed";
        iteration, max_iter: the last one done (-1: none), and their number;
        age: seconds since the freshest heartbeat;
        ranks: by rank (int), {"time", "age", "host", "pid", "phase", "iteration", "ended"};
        death: None, or {"rank", "iteration", "reason", "details", "time"} of the rank that failed
        first;
        requeues: a list of {"restart", "iteration", "reason", "time"}, one for each start that was
        stopped by a signal.
    """
    raise NotImplementedError
