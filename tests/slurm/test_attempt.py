"""What a job's processes are told by their environment, and how they find each other."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest
from torch.distributed import TCPStore

from contnet.launch.environment import (
    DistributedEnvironment,
    find_environment,
    first_host,
    ports,
    rendezvous,
)
from contnet.slurm.attempt import Attempt
from contnet.slurm.attempt_folder import AttemptFolder, last_saved_iteration, record_requeue
from contnet.slurm.cluster import Job, find_job
from contnet.slurm.describe import describe_run
from contnet.slurm.job import TrainingJob, python_command
from contnet.slurm.lease import Lease
from contnet.slurm.status import read_status
from contnet.utils.errors import UserError

STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
LOCAL = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_JOB_ID": "99",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_GLOBALID": "1",
}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "here",
    "MASTER_PORT": "1",
}


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
    ("environ", "place"),
    [
        ({}, None),
        (STEP, DistributedEnvironment("slurm", 3, 4, 1, 2, "gpu07", "77.0.0")),
        (
            {**STEP, "SLURM_RESTART_COUNT": "2"},
            DistributedEnvironment("slurm", 3, 4, 1, 2, "gpu07", "77.0.2"),
        ),
        (
            {**STEP, "SLURM_STEP_LAUNCHER_PORT": "4000"},
            DistributedEnvironment("slurm", 3, 4, 1, 2, "gpu07", "77.0.0.4000"),
        ),
        # An interactive shell: of salloc, of srun --pty, and a batch script.
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"}, None),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, None),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
        (LOCAL, DistributedEnvironment("local", 1, 2, 1, 2, "127.0.0.1", "99.0.0")),
        ({**LOCAL, "SUBMITIT_LOCAL_NTASKS": "1"}, None),
        (TORCHRUN, DistributedEnvironment("torchrun", 1, 2, 0, 1)),
        ({**STEP, **TORCHRUN}, DistributedEnvironment("torchrun", 1, 2, 0, 1)),
    ],
)
def test_place(environ, place):
    assert find_environment(environ) == place


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({k: v for k, v in STEP.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID is not"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "MASTER_PORT is not"),
        ({k: v for k, v in LOCAL.items() if "GLOBAL" not in k}, "SUBMITIT_LOCAL_GLOBALID is not"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, "--ntasks-per-node"),
        ({**STEP, "SLURM_PROCID": "2"}, "--distribution=block"),
    ],
)
def test_partial_settings(environ, message):
    with pytest.raises(UserError, match=message) as error:
        find_environment(environ)
    assert "\n" not in str(error.value)


def test_jobs_by_the_names_that_commands_take():
    step = {**STEP, "SLURM_RESTART_COUNT": "3"}
    assert find_job(step) == Job("slurm", "77", 3, 3, 4)
    array = {"SLURM_ARRAY_JOB_ID": "75", "SLURM_ARRAY_TASK_ID": "2"}
    assert find_job({**STEP, **array}).job_id == "75_2"
    assert find_job({**STEP, **LOCAL}) == Job("local", "99", 0, 1, 2)
    assert find_job({}).cluster == ""


def _meet_all(start, silent, size=3):
    """Ranks of a start as threads; their stores by rank. Rank 0 comes once all have met `silent`"""
    stores = {}

    def join(rank):
        place = DistributedEnvironment("slurm", rank, size, rank, size, "127.0.0.1", start)
        stores[rank] = rendezvous(place, join_timeout=60, answer_timeout=0.5)

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


def test_ranks_meet_though_ports_are_taken():
    number = str(os.getpid())
    # The first port answers, but is no store; the second is another job's; both jobs want them.
    silent = socket.create_server(("", ports(f"{number}.0.0")[0]))
    foreign = TCPStore("127.0.0.1", ports(f"{number}.0.0")[1], None, True, wait_for_workers=False)
    old = _meet_all(f"{number}.0.0", silent)
    new = _meet_all(f"{number}.0.1", silent)  # after a requeue, while the old one lives on
    for stores, value in ((old, "old"), (new, "new")):
        stores[0].set("who", value)
    assert [old[rank].get("who") for rank in (1, 2)] == [b"old"] * 2
    assert [new[rank].get("who") for rank in (1, 2)] == [b"new"] * 2
    silent.close()
    del foreign


def test_nobody_to_meet():
    place = DistributedEnvironment("slurm", 1, 2, 0, 1, "127.0.0.1", "12345.6.0")
    with pytest.raises(UserError, match=r"found no rank 0 on 127\.0\.0\.1"):
        rendezvous(place, join_timeout=0.5)


def test_ports_differ_between_jobs_and_steps():
    first = [ports(f"{job}.{step}.0")[0] for job in range(500, 600) for step in range(3)]
    assert len(set(first)) == len(first)
    assert ports("500.0.0") == ports("500.0.4")
    assert all(1024 < port < 32768 for port in ports("4000000000.0.0"))


def test_signals_wait_until_the_job_can_take_them(tmp_path):
    job = TrainingJob(["--help"], str(tmp_path), heartbeat_interval=1)
    assert pickle.loads(pickle.dumps(job)) == job
    code = (
        "import signal, sys; print('up', flush=True); sys.stdin.read(); "
        "print(sorted(signal.sigpending()), sys.argv)"
    )
    process = subprocess.Popen(
        f"exec {python_command()} -c \"{code}\" 'a b'",
        shell=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "up\n"
    for number in (signal.SIGUSR2, signal.SIGTERM):
        process.send_signal(number)
    out, _ = process.communicate(timeout=300)
    assert "SIGUSR2" in out and "SIGTERM" in out and "['-c', 'a b']" in out


def _lease(folder, job_id, restart, cluster=""):
    (folder / "slurm").mkdir(exist_ok=True)
    return Lease(folder, Job(cluster, job_id, restart))


def test_lease_passes_to_a_later_start_alone(tmp_path):
    old, new = _lease(tmp_path, "5", 0), _lease(tmp_path, "5", 1)
    assert not old.lost()
    old.take(timeout=0)
    assert not old.lost() and not new.lost()
    new.take(timeout=0)
    assert old.lost() and not new.lost()
    # Also for a rank of the old start that never saw its own lease.
    assert _lease(tmp_path, "5", 0).lost()
    old.release()
    assert not new.lost() and not json.loads(new.path.read_text())["released"]


def test_lease_of_another_job(tmp_path):
    first, second = _lease(tmp_path, "5", 3), _lease(tmp_path, "6", 0)
    first.take(timeout=0)
    folder = AttemptFolder(tmp_path, "5", 3)
    folder.path.mkdir(parents=True)
    alive = folder.rank_file(0, ".json")
    alive.write_text(json.dumps({"rank": 0, "time": time.time() + 1000}))
    with pytest.raises(UserError, match="belongs to job 5"):
        second.take(timeout=1.5)
    first.release()
    second.take(timeout=60)
    assert first.lost()


def test_last_saved(tmp_path):
    assert last_saved_iteration(tmp_path) == -1
    (tmp_path / "last_checkpoint").write_text("model_0000012.pth")
    assert last_saved_iteration(tmp_path) == 12
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    assert last_saved_iteration(tmp_path) > 10**9


def _attempt(run_folder, **options):
    """An attempt as a job makes it."""
    return Attempt(**asdict(TrainingJob([], str(run_folder), **options)))


def test_no_requeue_without_progress(tmp_path, monkeypatch):
    for name, value in LOCAL.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "last_checkpoint").write_text("model_0000012.pth")
    record_requeue(tmp_path, {"job_id": "99", "restart": 0, "iteration": 12, "reason": ""})
    start = _attempt(tmp_path)
    assert start.job.restart == 1
    assert "iteration 12" in start.reason_to_stop()
    (tmp_path / "last_checkpoint").write_text("model_0000013.pth")
    assert not start.reason_to_stop()
    start = _attempt(tmp_path, max_requeues=1)
    assert "requeue 1" in start.reason_to_stop()


def _beat(folder, rank, **more):
    folder.write_heartbeat(
        {"rank": rank, "host": "h", "pid": rank + 7, "iteration": 4, "max_iter": 9}
        | {"phase": "training", "heartbeat_interval": 30, "ended": None, **more}
    )


def test_status(tmp_path):
    assert read_status(tmp_path) == {}
    _lease(tmp_path, "5", 0).take(timeout=0)
    folder = AttemptFolder(tmp_path, "5", 0)
    folder.path.mkdir(parents=True)
    assert read_status(tmp_path)["state"] == "starting"
    _beat(folder, 1)
    _beat(folder, 0)
    status = read_status(tmp_path)
    assert (status["state"], status["iteration"], status["max_iter"]) == ("running", 4, 9)
    assert status["ranks"][1]["pid"] == 8 and 0 <= status["age"] < 60

    note = {"rank": 0, "reason": "gloo: closed by peer", "lost": True}
    assert folder.note("failure", note) and not folder.note("failure", {**note, "rank": 1})
    _beat(folder, 0, ended="failed")
    status = read_status(tmp_path)
    assert status["state"] == "failed" and status["failure"]["rank"] == 1
    assert "rank 1 (process 8 on h) ended without a word" in status["failure"]["reason"]


def test_a_silent_run(tmp_path, monkeypatch):
    _lease(tmp_path, "5", 0).take(timeout=0)
    folder = AttemptFolder(tmp_path, "5", 0)
    folder.path.mkdir(parents=True)
    _beat(folder, 0)
    assert read_status(tmp_path)["state"] == "running"
    later = time.time() + 1000
    monkeypatch.setattr("time.time", lambda: later)
    assert read_status(tmp_path)["state"] == "silent"
    assert describe_run(tmp_path).startswith("ended without a word")


def test_stale_notes_are_not_this_starts(tmp_path):
    folder = AttemptFolder(tmp_path, "5", 0)
    folder.path.mkdir(parents=True)
    file = folder.path / "failure.json"
    file.write_text(json.dumps({"rank": 0, "reason": "long ago", "time": time.time() - 9999}))
    assert folder.read("failure") is None
    assert folder.note("failure", {"rank": 1, "reason": "now"})
    assert folder.read("failure")["reason"] == "now"


def _fake_slurm(folder, state):
    """Clients of a SLURM that calls every job ``state``, and notes what it is asked for."""
    folder.mkdir()
    for name, answer in (("squeue", f"echo {state}"), ("scontrol", f'echo "$*" >> {folder}/calls')):
        (folder / name).write_text(f"#!/bin/sh\n{answer}\n")
        (folder / name).chmod(0o755)
    return {"SLURM_JOB_ID": "4242", "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


JOB = """
import os
from contnet.slurm.job import TrainingJob
try:
    {}()
finally:
    print("interfaces:", *(os.environ[name + "_SOCKET_IFNAME"] for name in ("NCCL", "GLOO")))
"""


@pytest.mark.parametrize(
    ("state", "interface", "number", "status", "said"),
    [
        (None, "", signal.SIGUSR2, 1, "nothing here can start the training again"),
        ("RUNNING", "ib0", signal.SIGTERM, 0, "; requeued"),  # clusters that send nothing else
    ],
)
def test_a_signalled_job_in_one_process(
    coco_root, tmp_path, state, interface, number, status, said
):
    """Without a cluster nothing can be requeued, and that is said."""
    from conftest import REPOSITORY, SMALL

    run = tmp_path / "run"
    config = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
    more = ["SOLVER.MAX_ITER", "200", "SOLVER.BASE_LR", "1e-4", "OUTPUT_DIR", str(run)]
    argv = ["--config-file", config, *SMALL, *more]
    job = TrainingJob(argv, str(run), heartbeat_interval=0.2, interface=interface)
    code = JOB.format(job)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SUBMITIT"))},
            **(_fake_slurm(tmp_path / "bin", state) if state else {}),
            "DETECTRON2_DATASETS": str(coco_root),
            "OMP_NUM_THREADS": "1",
            "NCCL_SOCKET_IFNAME": "other",
            "GLOO_SOCKET_IFNAME": "other",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None:
        if read_status(run).get("state") == "running":
            process.send_signal(number)
            break
        time.sleep(0.1)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == status, out[-3000:]
    assert f"interfaces: {interface or 'other'} {interface or 'other'}\n" in out
    leave = read_status(run)["exit"]
    assert said in leave["reason"], out[-3000:]
    assert last_saved_iteration(run) == leave["iteration"] >= 0
    calls = tmp_path / "bin" / "calls"
    assert leave["requeued"] == calls.exists() == (status == 0)
    if calls.exists():
        assert calls.read_text() == "requeue 4242\n"
