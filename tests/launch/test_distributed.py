"""Tests the number of processes, their arguments, and their results."""

import os
import subprocess
import sys

import pytest
from launchers import LOCAL, STEP, TORCHRUN

from contnet.launch.distributed import launch_run
from contnet.launch.environment import DistributedEnvironment, Processes, find_environment


@pytest.mark.parametrize(
    ("variables", "world_size"),
    [({}, 6), ({"SLURM_JOB_ID": "77"}, 6), (STEP, 4), (LOCAL, 2), (TORCHRUN, 2)],
    ids=["nothing", "allocation", "step", "local", "torchrun"],
)
def test_a_launcher_decides_how_many_there_are(variables, world_size):
    env = find_environment(variables)
    assert Processes(num_gpus=3, num_machines=2, environment=env).world_size == world_size


def test_a_process_alone_calls_the_function_itself(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    processes = Processes(environment=DistributedEnvironment())
    assert launch_run(len, "abc", processes, "cpu") == 3


CODE = """
import os, sys, torch
os.sched_setaffinity(0, {int(sys.argv[1])})
from contnet.launch.distributed import launch_run
from contnet.launch.environment import Processes
print("threads", launch_run(lambda _: torch.get_num_threads(), None, Processes(), "cpu"))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_threads_go_by_the_cpus_that_a_process_may_use():
    started = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    cpu = str(min(os.sched_getaffinity(0)))
    done = subprocess.run(
        [sys.executable, "-c", CODE, cpu],
        env={**kept, **started, "MASTER_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "threads 1\n" in done.stdout, done.stderr[-3000:]
