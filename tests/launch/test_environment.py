"""What a process is told by its environment, and how processes find each other."""

import os
import socket
import threading
from dataclasses import replace

import pytest
from launchers import LOCAL, STEP, TORCHRUN
from torch.distributed import TCPStore

from contnet.launch.environment import (
    DistributedEnvironment,
    find_environment,
    first_host,
    ports,
    rendezvous,
)
from contnet.utils.errors import UserError

ALONE = DistributedEnvironment()
IN_JOB = DistributedEnvironment(cluster="slurm", job_id="77")
IN_STEP = DistributedEnvironment(
    "slurm", 3, 4, 1, 2, "gpu07", "77.0.0", cluster="slurm", job_id="77", num_nodes=2
)
IN_LOCAL = DistributedEnvironment(
    "local", 1, 2, 1, 2, "127.0.0.1", "99.0.0", cluster="local", job_id="99"
)
BY_TORCHRUN = DistributedEnvironment("torchrun", 1, 2, 0, 1)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a,b", "a"),
        ("rack[2,4]node[1-3]x,b[1-2]", "rack2node1x"),
        ("127.0.0.[1-2]", "127.0.0.1"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("variables", "environment"),
    [
        ({}, ALONE),
        (STEP, IN_STEP),
        (
            {**STEP, "SLURM_RESTART_COUNT": "2"},
            replace(IN_STEP, attempt="77.0.2", restart=2),
        ),
        (
            {**STEP, "SLURM_STEP_LAUNCHER_PORT": "4000"},
            replace(IN_STEP, attempt="77.0.0.4000"),
        ),
        (
            {**STEP, "SLURM_ARRAY_JOB_ID": "75", "SLURM_ARRAY_TASK_ID": "2"},
            replace(IN_STEP, job_id="75_2"),
        ),
        # An interactive shell: of salloc, of srun --pty, and a batch script.
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"}, IN_JOB),
        (
            {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
            replace(IN_JOB, num_nodes=2),
        ),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, IN_JOB),
        (LOCAL, IN_LOCAL),
        ({**STEP, **LOCAL}, IN_LOCAL),
        ({**LOCAL, "SUBMITIT_LOCAL_NTASKS": "1"}, replace(ALONE, cluster="local", job_id="99")),
        (TORCHRUN, BY_TORCHRUN),
        (
            {**STEP, **TORCHRUN},
            replace(BY_TORCHRUN, cluster="slurm", job_id="77", num_nodes=2),
        ),
    ],
)
def test_environment(variables, environment):
    assert find_environment(variables) == environment


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({k: v for k, v in STEP.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID is not"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "MASTER_PORT is not"),
        ({k: v for k, v in LOCAL.items() if "GLOBAL" not in k}, "SUBMITIT_LOCAL_GLOBALID is not"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, "--ntasks-per-node"),
        ({**STEP, "SLURM_PROCID": "2"}, "--distribution=block"),
    ],
)
def test_partial_settings(variables, message):
    with pytest.raises(UserError, match=message) as error:
        find_environment(variables)
    assert "\n" not in str(error.value)


def _rendezvous_of_all(attempt, silent, size=3):
    """Ranks of an attempt as threads; their stores by rank. Rank 0 comes when all asked `silent`"""
    stores = {}

    def join(rank):
        env = DistributedEnvironment("slurm", rank, size, rank, size, "127.0.0.1", attempt)
        stores[rank] = rendezvous(env, join_timeout=60, answer_timeout=0.5)

    first, *others = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in others:
        thread.start()
    asked = [silent.accept() for _ in others]
    first.start()
    for thread in (first, *others):
        thread.join()
    for connection, _ in asked:
        connection.close()
    return stores


def test_rendezvous_though_ports_are_taken():
    number = str(os.getpid())
    # The first port answers, but is no store; the second is another job's; both jobs want them.
    silent = socket.create_server(("", ports(f"{number}.0.0")[0]))
    foreign = TCPStore("127.0.0.1", ports(f"{number}.0.0")[1], None, True, wait_for_workers=False)
    old = _rendezvous_of_all(f"{number}.0.0", silent)
    new = _rendezvous_of_all(f"{number}.0.1", silent)  # after a requeue, while the old one lives on
    for stores, value in ((old, "old"), (new, "new")):
        stores[0].set("who", value)
    assert [old[rank].get("who") for rank in (1, 2)] == [b"old"] * 2
    assert [new[rank].get("who") for rank in (1, 2)] == [b"new"] * 2
    silent.close()
    del foreign


def test_rendezvous_without_rank_0():
    env = DistributedEnvironment("slurm", 1, 2, 0, 1, "127.0.0.1", "12345.6.0")
    with pytest.raises(UserError, match=r"found no rank 0 on 127\.0\.0\.1"):
        rendezvous(env, join_timeout=0.5)


def test_ports_differ_between_jobs_and_steps():
    first = [ports(f"{job}.{step}.0")[0] for job in range(500, 600) for step in range(3)]
    assert len(set(first)) == len(first)
    assert ports("500.0.0") == ports("500.0.4")
    assert all(1024 < port < 32768 for port in ports("4000000000.0.0"))
