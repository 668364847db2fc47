"""Tests the rendezvous of processes if their first ports are taken."""

import os
import socket
import threading

import pytest
from torch.distributed import TCPStore

from contnet.launch.environment import DistributedEnvironment
from contnet.launch.rendezvous import ports, rendezvous
from contnet.utils.errors import UserError


def _rendezvous_of_all(attempt, silent, size=3):
    """Joins ranks as threads; returns stores by rank. Rank 0 is last, when all asked ``silent``."""
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
    # The first port answers, but is not a store; the second is another job's; both jobs want them.
    silent = socket.create_server(("", ports(f"{number}.0.0")[0]))
    foreign = TCPStore("127.0.0.1", ports(f"{number}.0.0")[1], None, True, wait_for_workers=False)
    old = _rendezvous_of_all(f"{number}.0.0", silent)
    new = _rendezvous_of_all(f"{number}.0.1", silent)  # after a requeue; the old one lives
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
