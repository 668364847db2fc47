"""Tests how commands end: exit statuses, signals, a closed output pipe."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

from contnet.utils.command import run_command
from contnet.utils.errors import UsageError, UserError

# A command with a process pool, like several tools, which works until it is stopped.
POOL = """
import sys, time
from contnet.utils.command import run_command
from contnet.utils.pools import process_pool

def work(number):
    sys.stdout.write("working\\n")  # in one piece, beside another process
    sys.stdout.flush()
    time.sleep(30 * number)

def command():
    with process_pool(2) as pool:
        list(pool.map(work, range(4)))

sys.exit(run_command(command))
"""
LINES = """
import sys
from contnet.utils.command import run_command

def command():
    for number in range(100_000):
        print(number)

sys.exit(run_command(command))
"""


def start(code: str, *prefix: str, arguments: Sequence[str] = ()) -> subprocess.Popen:
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def in_group(number: int) -> list[int]:
    """Returns the living processes of a group."""
    listed = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [int(pid) for pid, group, state in rows if int(group) == number and state[0] != "Z"]


def _fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (lambda: None, 0),
        (lambda: 1, 1),
        (lambda: _fail(UserError("a file is damaged")), 1),
        (lambda: _fail(UsageError("there is no such key")), 2),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143),
        (lambda: os.kill(os.getpid(), signal.SIGINT), 130),
    ],
    ids=["done", "findings", "failed", "usage", "SIGTERM", "SIGINT"],
)
def test_statuses(capsys, command, status):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_command(command) == status
    said = capsys.readouterr().err
    assert said.count("\n") == (status > 1 or "damaged" in said)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_our_own_mistakes_have_a_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whom"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)]
)
def test_a_signal_in_a_pool_that_nohup_has_started(number, whom):
    process = start(POOL, "nohup")
    assert process.stdout.readline() == process.stdout.readline() == "working\n"
    os.killpg(process.pid, signal.SIGHUP)  # ignored by all because of nohup
    assert process.stdout.readline() == "working\n"
    sent = time.monotonic()
    whom(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said.splitlines()[-1] == f"error: ended by {number.name}"
    assert "Traceback" not in said and time.monotonic() - sent < 25
    assert not in_group(process.pid)


@pytest.mark.slow
def test_a_reader_that_leaves():
    process = start(LINES)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""


FORKING = """
import os, signal, sys, time
from contnet.utils.command import run_command
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
def fork():
    if not os.fork():
        os._exit(0)
    time.sleep(60)
sys.exit(run_command(fork))
"""


def test_a_signal_while_a_process_forks_is_not_dropped():
    done = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stderr) == (143, "error: ended by SIGTERM\n")


TERMINATED = """
import multiprocessing, sys, time
from contnet.engine.interruption import Interruption
from contnet.utils.command import run_command

fork = multiprocessing.get_context("fork")
begun = fork.Event()

def work():
    begun.set()
    time.sleep(300)

def command():
    with Interruption() as interruption:
        interruption.saving = True
        pool = fork.Pool(1)
        pool.apply_async(work)
        begun.wait()
        pool.terminate()
        pool.join()

sys.exit(run_command(command))
"""


def test_a_pool_of_others_ends_its_processes():
    """Detectron2 reads Cityscapes with such a pool, and so may users' data sets."""
    assert subprocess.run([sys.executable, "-c", TERMINATED], timeout=30).returncode == 0


# Killed while one child is working and others were just forked, before PyTorch's loader workers
# check their parent for the first time.
KILLED = """
import sys, time
from torch.utils.data import DataLoader
from contnet.utils.command import run_command
from contnet.utils.pools import process_pool

def begin(worker=None):
    print("begun", flush=True)
    time.sleep(1)

def of_a_loader():
    list(DataLoader(range(2), num_workers=1, worker_init_fn=begin))

def of_a_pool():
    with process_pool(1) as pool:
        pool.submit(begin).result()
        pool.submit(time.sleep, 300).result()

sys.exit(run_command(globals()[sys.argv[1]]))
"""


@pytest.mark.parametrize("children", ["of_a_loader", "of_a_pool"])
def test_no_child_is_left_behind(children):
    process = start(KILLED, arguments=[children])
    assert process.stdout.readline() == "begun\n"
    process.kill()
    process.wait(10)
    until = time.monotonic() + 10
    while in_group(process.pid):
        assert time.monotonic() < until, "a child waits for ever"
        time.sleep(0.05)
