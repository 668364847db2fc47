"""Tests attempts of a job: signals, lease, heartbeats, requeues."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
from finished import write_config
from launchers import LOCAL, STEP
from torch.distributed import DistBackendError
from torch.utils.data import DataLoader, Dataset

from contnet.launch.environment import find_environment
from contnet.launch.run_lease import newest_lease
from contnet.slurm import attempt as attempts
from contnet.slurm.attempt import Attempt
from contnet.slurm.attempt_folder import AttemptFolder, last_saved_iteration, record_requeue
from contnet.slurm.cluster import Job
from contnet.slurm.describe import describe_run
from contnet.slurm.job import TrainingJob, python_command
from contnet.slurm.lease import Lease
from contnet.slurm.nccl import leave_failures_to_watcher
from contnet.slurm.preemption import Preempted
from contnet.slurm.status import read_status
from contnet.utils.errors import UsageError, UserError
from contnet.utils.records import DamagedFile


def _job(environ):
    return Job.of(find_environment(environ))


def test_jobs_by_the_names_that_commands_take():
    step = {**STEP, "SLURM_RESTART_COUNT": "3"}
    assert _job(step) == Job("slurm", "77", 3, 3, 4, 2)
    array = {"SLURM_ARRAY_JOB_ID": "75", "SLURM_ARRAY_TASK_ID": "2"}
    assert _job({**STEP, **array}).job_id == "75_2"
    assert _job({**STEP, **LOCAL}) == Job("local", "99", 0, 1, 2)
    assert _job({"SLURM_JOB_ID": "77"}) == Job("slurm", "77")
    assert _job({}) == Job("", f"process{os.getpid()}")


def test_signals_wait_until_the_job_can_take_them(tmp_path):
    job = TrainingJob("config.yaml", str(tmp_path), heartbeat_interval=1)
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


def test_lease_passes_to_a_later_attempt_alone(tmp_path):
    old, new = _lease(tmp_path, "5", 0), _lease(tmp_path, "5", 1)
    assert not old.lost()
    old.take(patience=0)
    assert not old.lost() and not new.lost()
    new.take(patience=0)
    assert old.lost() and not new.lost()
    # This includes a rank of the old attempt that never saw its own lease.
    assert _lease(tmp_path, "5", 0).lost()
    old.release()
    owner, _ = newest_lease(tmp_path)
    assert not new.lost() and owner.attempt == ("", "5", 1)


def _take_and_wait(folder, pipe):
    _lease(folder, "5", 3, "slurm").take()
    pipe.send("taken")
    signal.pause()


@pytest.mark.parametrize(("state", "free"), [("RUNNING", False), ("FAILED", True), ("", False)])
def test_slurm_says_whether_the_job_of_a_living_process_goes_on(tmp_path, monkeypatch, state, free):
    """A node that SLURM has marked as failed may still run its tasks."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_take_and_wait, args=(tmp_path, theirs))
    process.start()
    assert ours.recv() == "taken"
    monkeypatch.setenv("PATH", _fake_slurm(tmp_path / "bin", state)["PATH"])
    lease = _lease(tmp_path, "6", 0, "slurm")
    if free:
        lease.take()
    else:
        with pytest.raises(UserError, match=f"job 5, process {process.pid} "):
            lease.take(patience=1)
    process.kill()
    process.join()


def test_last_saved(tmp_path):
    assert last_saved_iteration(tmp_path) == -1
    (tmp_path / "last_checkpoint").write_text("model_0000012.pth")
    assert last_saved_iteration(tmp_path) == 12
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    assert last_saved_iteration(tmp_path) > 10**9


def _attempt(run_folder, **options):
    """Makes an attempt like a job does."""
    return Attempt(**asdict(TrainingJob("", str(run_folder), **options)))


def test_no_requeue_without_progress(tmp_path, monkeypatch):
    for name, value in LOCAL.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "last_checkpoint").write_text("model_0000012.pth")
    record_requeue(tmp_path, {"job_id": "99", "restart": 0, "iteration": 12, "reason": ""})
    attempt = _attempt(tmp_path)
    assert attempt.job.restart == 1
    assert "iteration 12" in attempt.reason_to_stop()
    for saved in ("model_0000013.pth", "model_0000006.pth"):  # the second one with twice the batch
        (tmp_path / "last_checkpoint").write_text(saved)
        assert not attempt.reason_to_stop()
    attempt = _attempt(tmp_path, max_requeues=1)
    assert "requeue 1" in attempt.reason_to_stop()


def test_a_local_job_goes_on_though_its_requeues_are_damaged(tmp_path, monkeypatch):
    for name, value in LOCAL.items():
        monkeypatch.setenv(name, value)
    for restart, requeued in ((0, True), (1, True), (2, False)):
        folder = AttemptFolder(tmp_path, "99", restart)
        folder.path.mkdir(parents=True)
        note = {"rank": 0, "requeued": requeued, "reason": "", "status": 0}
        folder.note("exit", note)
    (tmp_path / "slurm" / "requeues.json").write_text("[{")
    assert _attempt(tmp_path).job.restart == 2


def _heartbeat(folder, rank, **more):
    folder.write_heartbeat(
        {"rank": rank, "host": "h", "pid": rank + 7, "iteration": 4, "max_iter": 9}
        | {"phase": "training", "heartbeat_interval": 30, "ended": None, **more}
    )


def test_status(tmp_path):
    assert read_status(tmp_path) == {}
    _lease(tmp_path, "5", 0).take(patience=0)
    folder = AttemptFolder(tmp_path, "5", 0)
    folder.path.mkdir(parents=True)
    assert read_status(tmp_path)["state"] == "starting"
    _heartbeat(folder, 1)
    _heartbeat(folder, 0)
    status = read_status(tmp_path)
    assert (status["state"], status["iteration"], status["max_iter"]) == ("running", 4, 9)
    assert status["ranks"][1]["pid"] == 8 and 0 <= status["age"] < 60

    note = {"rank": 0, "reason": "gloo: closed by peer", "lost": True}
    assert folder.note("failure", note) and not folder.note("failure", {**note, "rank": 1})
    _heartbeat(folder, 0, ended="failed")
    status = read_status(tmp_path)
    assert status["state"] == "failed" and status["failure"]["rank"] == 1
    assert "rank 1 (process 8 on h) ended without a message" in status["failure"]["reason"]


class _Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DamagedFile("bad.jpg cannot be loaded")


def _fail(folder, error):
    """Runs in a separate process and never returns; signals and timers are the watcher's."""
    status = 1
    try:
        watcher = _attempt(folder).watcher
        watcher.lease.take()
        watcher.start()
        try:
            next(iter(DataLoader(_Broken(), num_workers=1)))
        except DamagedFile as of_worker:
            watcher.fail(error or of_worker)
        status = 0
    finally:
        os._exit(status)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, "bad.jpg cannot be loaded"),  # an error of the loader
        (UsageError("no such key"), "no such key"),
        (ValueError("no such number"), "ValueError: no such number"),
    ],
)
def test_status_says_what_the_error_line_of_a_failed_job_says(tmp_path, error, said):
    process = multiprocessing.get_context("fork").Process(target=_fail, args=(tmp_path, error))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert describe_run(tmp_path) == f"failed: {said} (rank 0)"


def test_a_silent_run(tmp_path, monkeypatch):
    _lease(tmp_path, "5", 0).take(patience=0)
    folder = AttemptFolder(tmp_path, "5", 0)
    folder.path.mkdir(parents=True)
    _heartbeat(folder, 0)
    assert read_status(tmp_path)["state"] == "running"
    later = time.time() + 1000
    monkeypatch.setattr("time.time", lambda: later)
    assert read_status(tmp_path)["state"] == "silent"
    assert describe_run(tmp_path).startswith("ended without a message")


def test_stale_notes_are_not_this_attempts(tmp_path):
    folder = AttemptFolder(tmp_path, "5", 0)
    folder.path.mkdir(parents=True)
    file = folder.path / "failure.json"
    file.write_text(json.dumps({"rank": 0, "reason": "long ago", "time": time.time() - 9999}))
    assert folder.read("failure") is None
    assert folder.note("failure", {"rank": 1, "reason": "now"})
    assert folder.read("failure")["reason"] == "now"


def _fake_slurm(folder, state):
    """Makes clients of a SLURM in which every job is in ``state``, and which records calls."""
    folder.mkdir()
    for name, answer in (("squeue", f"echo {state}"), ("scontrol", f'echo "$*" >> {folder}/calls')):
        (folder / name).write_text(f"#!/bin/sh\n{answer}\n")
        (folder / name).chmod(0o755)
    return {"SLURM_JOB_ID": "4242", "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


class _Signalled(Attempt):
    def _train(self):
        raise Preempted


def _end_signalled(folder):
    """Runs in a separate process and never returns."""
    try:
        _Signalled(**asdict(TrainingJob("", str(folder)))).run()
    except UserError:
        os._exit(7)
    finally:
        os._exit(1)


def test_a_requeue_that_cannot_be_noted_is_a_failure(tmp_path, monkeypatch):
    for name, value in _fake_slurm(tmp_path / "bin", "RUNNING").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "slurm" / "requeues.json.4242-000.tmp").mkdir(parents=True)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_end_signalled, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 7
    failed = f"failed: {tmp_path}/slurm/requeues.json cannot be written"
    assert describe_run(tmp_path).startswith(failed)
    assert read_status(tmp_path)["ranks"][0]["ended"] == "failed"
    assert not (tmp_path / "bin" / "calls").exists()


def test_a_decision_that_could_not_be_noted_at_once_stays(tmp_path, monkeypatch):
    for name, value in _fake_slurm(tmp_path / "bin", "RUNNING").items():
        monkeypatch.setenv(name, value)
    attempt = _attempt(tmp_path)
    attempt.lease.take()
    in_the_way = attempt.folder.path / "exit-00000.new"
    in_the_way.mkdir(parents=True)
    with pytest.raises(OSError, match=in_the_way.name):
        attempt.watcher.abandon("a signal")
    in_the_way.rmdir()
    assert attempt.watcher.abandon("a signal") == 0
    assert attempt.folder.read("exit")["requeued"]
    assert len((tmp_path / "bin" / "calls").read_text().splitlines()) == 1


class _Alone(Attempt):
    """Rank 0, whose collective has failed because a node is gone."""

    def _begin(self):
        self.lease.take()

    def _train(self):
        raise DistBackendError("NCCL error in: x.cpp:1, remote process exited\nncclRemoteError: x")


def _lose_a_node(folder):
    """Runs in a separate process and never returns."""
    attempts._NODE_SILENCE = 0
    try:
        _Alone(**asdict(TrainingJob("", str(folder)))).run()
    except SystemExit as end:
        os._exit(end.code)
    finally:
        os._exit(1)


def test_a_job_that_nccl_says_has_lost_a_node_is_requeued(tmp_path, monkeypatch):
    slurm = _fake_slurm(tmp_path / "bin", "RUNNING")
    rank = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for name, value in {**STEP, **rank, **slurm}.items():
        monkeypatch.setenv(name, value)
    process = multiprocessing.get_context("fork").Process(target=_lose_a_node, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    reason = "a node does not respond; requeued"
    assert AttemptFolder(tmp_path, "4242", 0).read("exit")["reason"] == reason
    assert (tmp_path / "bin" / "calls").read_text() == "requeue 4242\n"


def _abort_as_nccl(folder):
    _attempt(folder).watcher.start()
    os.abort()


def test_an_aborted_process_leaves_its_stacks(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_abort_as_nccl, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGABRT
    (stacks,) = tmp_path.glob("slurm/attempts/*/rank-00000.stack")
    assert "Aborted" in (text := stacks.read_text()) and "_abort_as_nccl" in text


def test_nccl_leaves_failures_to_the_watcher_unless_the_user_decides(tmp_path):
    environ = {}
    leave_failures_to_watcher(tmp_path, 1860.0, environ)
    assert environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "1860"
    assert f"{tmp_path}/nccl-" in environ.values()
    given = dict.fromkeys(environ, "3")
    environ = dict(given)
    leave_failures_to_watcher(tmp_path, 1860.0, environ)
    assert environ == given
    environ = {"NCCL_ASYNC_ERROR_HANDLING": "1"}  # the older name
    leave_failures_to_watcher(tmp_path, 1860.0, environ)
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in environ


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
        (None, "", signal.SIGUSR2, 1, "without SLURM, nothing can restart the training"),
        ("RUNNING", "ib0", signal.SIGTERM, 0, "; requeued"),  # some clusters send only this
    ],
)
def test_a_signalled_job_in_one_process(
    coco_root, tmp_path, state, interface, number, status, said
):
    """Without a cluster, nothing can be requeued, and the message says that."""
    from conftest import REPOSITORY, SMALL

    run = tmp_path / "run"
    config = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
    more = ["SOLVER.MAX_ITER", "200", "SOLVER.BASE_LR", "1e-4", "OUTPUT_DIR", str(run)]
    argv = ["--config-file", config, *SMALL, *more]
    told = write_config(argv, tmp_path / "config.yaml")
    job = TrainingJob(**told, heartbeat_interval=0.2, interface=interface)
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
