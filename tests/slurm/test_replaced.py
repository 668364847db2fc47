"""Tests that an attempt that was replaced by a later one ends, and writes nothing more."""

import os
import signal
import subprocess
import sys
import time

import pytest
from finished import write_config
from jobs import arguments
from toy import ToyJob

from contnet.slurm.attempt_folder import AttemptFolder
from contnet.slurm.cluster import Job
from contnet.slurm.lease import Lease

REPLACED = """
from toy import ToyJob
{}()
"""


def _wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)


def _written(run):
    """Returns the times of the run's files, except logs, which may still grow."""
    files = [path for path in run.iterdir() if path.is_file() and "log" not in path.name]
    return {path.name: path.stat().st_mtime_ns for path in files if path.suffix != ".tmp"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("background", "heartbeat_interval"),
    [("False", 600), ("True", 600), ("True", 0.2)],
    ids=["in a write", "beside a write", "by the watcher"],
)
def test_a_replaced_attempt_ends_without_a_trace(
    coco_root, tmp_path, monkeypatch, background, heartbeat_interval
):
    """It was stopped while writing a checkpoint, and continues after a later attempt started."""
    run = tmp_path / "run"
    options = ("SOLVER.CHECKPOINT_PERIOD", "10", "SOLVER.CHECKPOINT_BACKGROUND", background)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(coco_root))
    job = ToyJob(
        **write_config(arguments(run, *options), tmp_path / "config.yaml"),
        heartbeat_interval=heartbeat_interval,
        faults={"pace": 0.1, "save": 5.0},
    )
    process = subprocess.Popen(
        [sys.executable, "-c", REPLACED.format(job)],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SUBMITIT"))},
            "PYTHONPATH": os.pathsep.join(sys.path),
            "DETECTRON2_DATASETS": str(coco_root),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    _wait_for(process, (run / "saving").exists)
    process.send_signal(signal.SIGSTOP)
    (unfinished,) = run.glob("model_*.tmp")
    assert unfinished.name == f"model_0000009.pth.process{process.pid}-000.tmp"
    Lease(run, Job("", f"process{process.pid}", restart=1)).take(patience=0)
    before = _written(run)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 3, out[-3000:]
    assert "a later attempt of the job owns the run: this one ends" in out
    assert _written(run) == before and not list(run.glob("*.tmp"))
    folder = AttemptFolder(run, f"process{process.pid}", 0)
    assert not folder.read("failure") and not folder.read("exit")
