"""Tests the lease of a run's folder with real processes."""

import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time

import pytest

from contnet.launch.run_lease import LeaseLost, RunLease
from contnet.utils.errors import UserError
from contnet.utils.processes import process_start

FORK = multiprocessing.get_context("fork")


class OfTwoSeconds(RunLease):
    silence = 2.0


def _take(folder, start, answers, job):
    start.wait()
    lease = OfTwoSeconds(folder, *job)
    try:
        lease.take()
    except UserError as error:
        answers.put((os.getpid(), str(error)))
    else:
        answers.put((os.getpid(), ""))
        signal.pause()


def _take_and_fork(folder, children):
    RunLease(folder).take()
    if os.fork() == 0:
        # Another test may have made forked processes end with their parent.
        ctypes.CDLL(None).prctl(1, 0)  # PR_SET_PDEATHSIG
        children.put(os.getpid())
    signal.pause()


def race(folder, number, job=()):
    """Starts processes that take the lease at once; returns the pids that got it and the errors."""
    start, answers = FORK.Barrier(number), FORK.SimpleQueue()
    for _ in range(number):
        FORK.Process(target=_take, args=(folder, start, answers, job), daemon=True).start()
    told = [answers.get() for _ in range(number)]
    return [pid for pid, error in told if not error], [error for _, error in told if error]


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    next(child for child in multiprocessing.active_children() if child.pid == pid).join()


def newest(folder):
    return max(path for path in (folder / "lease").iterdir() if path.name.isdigit())


def no_locks(*_):
    raise OSError(37, "No locks available")


def rewrite(folder, **values):
    """Changes the owner's values in the newest lease."""
    file = newest(folder) / "owner.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("expired", [False, True, "elsewhere"])
def test_of_processes_that_take_the_lease_at_once_one_gets_it(tmp_path, expired):
    for i in range(2 if expired == "elsewhere" else 20):
        folder = tmp_path / ("run" if expired else f"run{i}")
        winners, told = race(folder, 4)
        assert len(winners) == 1, told
        assert len(told) == 3 and all(f"(process {winners[0]} on host" in each for each in told)
        kill(winners[0])
        if expired == "elsewhere":  # neither the process nor its lock can be checked
            rewrite(folder, machine="another")
    assert not list(tmp_path.glob("*/lease/new-*"))


def test_a_process_of_another_machine_counts_by_its_heartbeats(tmp_path, monkeypatch):
    """The clocks of the machines do not matter, and locks do not work across machines."""
    monkeypatch.setattr("fcntl.lockf", no_locks)
    (owner,), _ = race(tmp_path, 1)
    rewrite(tmp_path, machine="another", time="2999-01-01 00:00:00")
    begun, lease = time.monotonic(), OfTwoSeconds(tmp_path)
    lease.silence = 60
    os.utime(newest(tmp_path) / "owner.json", (2**33, 2**33))  # the next heartbeat is earlier
    with pytest.raises(UserError, match=f"in use by a training .process {owner} "):
        lease.take()
    assert time.monotonic() - begun < 30
    kill(owner)
    os.utime(newest(tmp_path) / "owner.json", (2**33, 2**33))
    OfTwoSeconds(tmp_path).take()


def test_children_of_a_killed_process_do_not_keep_the_lease(tmp_path):
    children = FORK.SimpleQueue()
    owner = FORK.Process(target=_take_and_fork, args=(tmp_path, children))
    owner.start()
    child = children.get()
    with pytest.raises(UserError, match="in use"):
        RunLease(tmp_path).take()
    owner.kill()
    owner.join()
    assert process_start(child)
    RunLease(tmp_path).take()
    os.kill(child, signal.SIGKILL)


def test_without_locks_the_process_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.lockf", no_locks)
    (owner,), _ = race(tmp_path, 1)
    with pytest.raises(UserError, match="in use"):
        RunLease(tmp_path).take()
    kill(owner)
    assert len(race(tmp_path, 4)[0]) == 1


def test_a_process_that_is_ending_is_waited_for(tmp_path):
    (owner,), _ = race(tmp_path, 1)
    threading.Timer(0.5, os.kill, (owner, signal.SIGKILL)).start()
    RunLease(tmp_path).check_free()


def test_a_copied_folder_is_free(tmp_path):
    race(tmp_path / "run", 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    RunLease(tmp_path / "copy").take()
    with pytest.raises(UserError, match="in use"):
        RunLease(tmp_path / "run").take()


@pytest.mark.parametrize(
    "content",
    [b"", b'{"machine": ', b"[]", b'{"pid": "x"}', b"\xff\x00", None, "file", "folder", "pipe"],
)
def test_a_damaged_lease_is_none(tmp_path, content):
    first = tmp_path / "lease" / "000001"
    if content == "file":
        (tmp_path / "lease").write_text("no folder")
    elif content == "folder":
        first.mkdir(parents=True)
        (first / "owner.json").mkdir()
    elif content == "pipe":
        first.mkdir(parents=True)
        os.mkfifo(first / "owner.json")
        os.mkfifo(first / "lock")
    else:
        (owner,), _ = race(tmp_path, 1)
        file = first / "owner.json"
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(UserError, match="in use by a training whose lease is damaged"):
            RunLease(tmp_path).check_free()
        kill(owner)
    RunLease(tmp_path).check_free()
    RunLease(tmp_path).take()


@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_a_later_attempt_takes_the_lease_from_a_living_one(tmp_path, cluster):
    first = RunLease(tmp_path, cluster, "7", 0)
    first.take()
    other_rank = RunLease(tmp_path, cluster, "7", 0)
    assert not first.lost() and not other_rank.lost()
    (later,), _ = race(tmp_path, 1, (cluster, "7", 1))
    assert len(race(tmp_path, 1, (cluster, "8", 5))[1]) == 1  # another job
    for lease in (first, other_rank, RunLease(tmp_path, cluster, "7", 0)):
        with pytest.raises(LeaseLost):
            lease.check()
    with pytest.raises(LeaseLost):
        RunLease(tmp_path, cluster, "7", 0).take()
    first.release()
    with pytest.raises(UserError, match=f"job 7, process {later} "):
        RunLease(tmp_path).take()


def test_a_lease_that_is_taken_while_another_thread_asks_is_not_lost(tmp_path, monkeypatch):
    lease, listdir = RunLease(tmp_path), os.listdir

    def list_and_take(folder):
        names = listdir(folder) if os.path.isdir(folder) else []
        monkeypatch.setattr("os.listdir", listdir)
        lease.take()
        return names

    monkeypatch.setattr("os.listdir", list_and_take)
    assert not lease.lost() and newest(tmp_path)
    assert not lease.lost()
