"""Tests signals in training, which saves before it ends or ends at once, and killed ranks."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import QUICK, REPOSITORY, metrics_of

pytestmark = pytest.mark.slow

RUN = """
--config-file configs/imagenet/contti.yaml MODEL.CLASSIFIER.NUM_CLASSES 7 SOLVER.BASE_LR 0.01
INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32 INPUT.CLASSIFIER.CROP_TEST 32 LOG_PERIOD 1
SOLVER.IMS_PER_BATCH 4 SOLVER.CHECKPOINT_PERIOD 1000 TEST.IMS_PER_PROCESS 1
"""


@pytest.fixture
def start(imagenet_root, tmp_path):
    """Starts train_net.py as the leader of a process group, which is killed at the end."""
    started = []

    def start(*options: str, folder: str = "run", nohup: bool = False) -> subprocess.Popen:
        command = [sys.executable, "train_net.py", *QUICK, *RUN.split()]
        process = subprocess.Popen(
            [
                *(["nohup"] if nohup else []),
                *command,
                "OUTPUT_DIR",
                str(tmp_path / folder),
                *options,
            ],
            env={**os.environ, "DETECTRON2_DATASETS": str(imagenet_root), "OMP_NUM_THREADS": "1"},
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def until(process: subprocess.Popen, word: str) -> None:
    """Reads the output up to a line that contains a word."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return
    raise AssertionError("".join(lines[-30:]))


def end_of(process: subprocess.Popen) -> tuple[int, str]:
    """Returns the exit status and the remaining output of a run, which must end within a minute."""
    rest, _ = process.communicate(timeout=60)
    assert "Traceback" not in rest
    return process.returncode, rest


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Returns the spawned processes of a run, by rank."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)],
        text=True,
        capture_output=True,
    )
    lines = [line.split(None, 1) for line in listed.stdout.splitlines()]
    return [int(pid) for pid, command in lines if "spawn_main" in command]


def same(a: object, b: object) -> bool:
    """Returns whether nested states are bit for bit equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def are_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_saves_and_a_resume_is_exact(start, tmp_path, processes):
    options = ["--num-gpus", str(processes), "SOLVER.MAX_ITER", "12", "DATALOADER.NUM_WORKERS", "1"]
    process = start(*options, nohup=processes == 1)
    until(process, "iter: 3 ")
    if processes == 1:  # a closed terminal, which nohup ignores, and Ctrl-C
        os.killpg(process.pid, signal.SIGHUP)
        until(process, "iter: 4 ")
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.killpg(process.pid, signal.SIGTERM)  # loader workers get it too, as with SLURM's scancel
    status, rest = end_of(process)
    assert status == (130 if processes == 1 else 143)
    assert sum("--resume" in line for line in rest.splitlines()) == 1
    saved = int(re.search(r"saved after iteration (\d+)", rest)[1])
    assert (tmp_path / "run" / "last_checkpoint").read_text() == f"model_{saved:07d}.pth"
    resumed, uncut = start(*options, "--resume"), start(*options, folder="uncut")
    until(resumed, f"Starting training from iteration {saved + 1}")
    assert end_of(resumed)[0] == end_of(uncut)[0] == 0
    ours, theirs = (torch.load(tmp_path / name / "model_final.pth") for name in ("run", "uncut"))
    assert same(ours["model"], theirs["model"])
    assert same(ours["trainer"]["optimizer"], theirs["trainer"]["optimizer"])
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "uncut")


def test_an_evaluation_ends_at_once(start, tmp_path):
    process = start("TEST.EVAL_PERIOD", "2", "SOLVER.MAX_ITER", "100")
    until(process, "Start inference")
    os.kill(process.pid, signal.SIGHUP)
    status, rest = end_of(process)
    assert status == 129 and "error: ended by SIGHUP" in rest
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not (tmp_path / "run" / "results.json").exists()


def test_the_second_signal_ends_ranks_that_cannot_save(start, tmp_path):
    process = start("--num-gpus", "2", "SOLVER.MAX_ITER", "100")
    until(process, "iter: 2 ")
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGSTOP)
    os.kill(process.pid, signal.SIGINT)
    until(process, "a second signal ends")
    while process.poll() is None:  # like impatient users
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.5)
    assert end_of(process)[0] == 130
    assert are_gone(ranks)
    assert not (tmp_path / "run" / "last_checkpoint").exists()


@pytest.mark.parametrize("killed", ["rank 1", pytest.param("parent", marks=pytest.mark.long)])
def test_a_kill_ends_all(start, killed):
    process = start("--num-gpus", "2", "SOLVER.MAX_ITER", "100")
    until(process, "iter: 2 ")
    ranks = ranks_of(process)
    os.kill(process.pid if killed == "parent" else ranks[1], signal.SIGKILL)
    status, rest = end_of(process)
    assert are_gone(ranks)
    if killed == "rank 1":
        (line,) = [line for line in rest.splitlines() if line.startswith("error: ")]
        assert status == 1 and line.startswith(f"error: rank 1 on {socket.gethostname()} ")
        assert f"process {ranks[1]}" in line and "SIGKILL" in line and "memory" in line
