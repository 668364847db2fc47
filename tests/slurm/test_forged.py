"""Tests forged files submission.json: no signals and no files except the run's own."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, SMALL
from submissions import GPU, LEAF, error_of, submit

from contnet.slurm.jobs import RUN_VARIABLE
from contnet.slurm.records import read_submissions
from contnet.slurm.submit import main
from contnet.utils.processes import process_start

pytest_plugins = ["submissions"]
SLEEP = shutil.which("sleep")


@pytest.fixture
def sleeper():
    """Starts a process of this user, with additional environment variables."""
    started = []

    def start(**environment):
        process = subprocess.Popen(
            [SLEEP, "1000"], env={**os.environ, **environment}, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def forge(folder, **values):
    """Writes a folder with a submission record that can have other values."""
    slurm = folder.absolute() / "slurm"
    record = {
        "time": "2026-01-01T00:00:00+0000",
        "cluster": "local",
        "host": os.uname().nodename,
        "job_id": "1",
        "runs": {},
        "run_folder": str(folder.absolute()),
        "job_folder": str(slurm / "submission1"),
        "log": str(slurm / "submission1" / "1_0_log.out"),
        "nodes": 1,
        "tasks": 1,
        "process_start": "",
    }
    (slurm / "submission1").mkdir(parents=True, exist_ok=True)
    (slurm / "submission.json").write_text(json.dumps([{**record, **values}]))
    return folder


def forge_process(folder, process):
    return forge(folder, job_id=str(process.pid), process_start=process_start(process.pid))


def test_cancel_ends_only_processes_of_the_run(no_slurm, sleeper, capsys):
    out, other = no_slurm / "out", no_slurm / "other"
    for foreign in (sleeper(), sleeper(**{RUN_VARIABLE: str(other)})):
        forge_process(out, foreign)
        said = error_of(capsys, "--cancel", "out")
        assert f"process {foreign.pid} does not belong to this run" in said
        assert foreign.poll() is None
    # A process with a reused process id.
    own = sleeper(**{RUN_VARIABLE: str(out)})
    forge(out, job_id=str(own.pid), process_start="17")
    error_of(capsys, "--cancel", "out")
    assert own.poll() is None
    forge_process(out, own)
    assert main(["--cancel", "out"]) == 0
    assert own.wait(30) < 0


def test_cancel_of_a_sweep_sends_no_signal_to_a_process_without_mark(
    no_slurm, sleeper, capsys, monkeypatch
):
    monkeypatch.setattr("contnet.slurm.jobs._PATIENCE", -9)  # plus 10 s
    foreign, mine = sleeper(), sleeper(**{RUN_VARIABLE: str(no_slurm / "out" / "a")})
    forge_process(no_slurm / "out" / "a", mine)
    values = {"process_start": process_start(foreign.pid), "runs": {"a": ""}}
    forge(no_slurm / "out", job_id=str(foreign.pid), **values)
    assert f"process {foreign.pid} does not belong to this run" in error_of(
        capsys, "--cancel", "out"
    )
    assert foreign.poll() is None and mine.wait(30) < 0


@pytest.mark.parametrize(
    "values",
    [
        {"job_id": "--user=me"},
        {"job_id": "1,2"},
        {"job_id": "-1"},
        {"job_id": ""},
        {"job_id": 7},
        {"cluster": "local", "job_id": "../self"},
        {"runs": {"../other": "1"}},
        {"runs": {"/etc": "1"}},
        {"runs": {"..": ""}},
        {"runs": {"a": "--all"}},
        {"runs": []},
        {"log": None},
        {"log": "1/.."},
        {"log": "1/" + "a" * 5000},
        {"job_folder": ".."},
        {"job_folder": "/a/slurm/.."},
    ],
)
@pytest.mark.parametrize("option", ["--cancel", "--status"])
def test_what_is_no_job_is_refused(slurm, here, capsys, values, option):
    forge(here / "out", **{"cluster": "slurm", **values})
    assert "submission.json cannot be read" in error_of(capsys, option, "out")
    assert not slurm.calls


def test_cancel_ends_only_jobs_that_were_submitted_from_the_folder(slurm, here, capsys):
    assert submit(*GPU, "OUTPUT_DIR", "mine") == 0
    slurm.show_jobs("4242|RUNNING|None\n")
    forge(here / "out", cluster="slurm", job_id="4242")
    assert "job 4242 was not submitted from" in error_of(capsys, "--cancel", "out")
    assert not [call for call in slurm.calls if call.startswith("scancel")]
    assert main(["--cancel", "mine"]) == 0
    assert "scancel 4242" in slurm.calls


@pytest.mark.parametrize("kind", ["elsewhere", "link", "linked folder", "pipe"])
def test_watch_reads_only_logs_of_the_run(no_slurm, capsys, kind):
    secret, out = no_slurm / "secret", no_slurm / "out"
    secret.mkdir()
    (secret / "1_0_log.out").write_text("a secret")
    forge(out, **({"log": str(secret / "1_0_log.out")} if kind == "elsewhere" else {}))
    log = out / "slurm" / "submission1" / "1_0_log.out"
    if kind == "link":
        log.symlink_to(secret / "1_0_log.out")
    elif kind == "linked folder":
        log.parent.rmdir()
        log.parent.symlink_to(secret)
    elif kind == "pipe":
        os.mkfifo(log)
    status = main(["--status", "out", "--watch"])
    shown, said = capsys.readouterr()
    assert status == 1 and "a secret" not in shown
    if kind != "elsewhere":  # elsewhere, the log is looked up by name in the run's folder
        assert said.startswith("error: ") and "is not a log of this run" in said


def test_a_folder_that_was_moved_or_linked_has_its_logs(no_slurm, capsys):
    forge(no_slurm / "out")
    (no_slurm / "out" / "slurm" / "submission1" / "1_0_log.out").write_text("it said so")
    shutil.move("out", "moved")
    os.symlink("moved", "linked")
    for folder in ("moved", "linked"):
        assert main(["--status", folder, "--watch"]) == 1
        assert "it said so" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_of_this_machine_ends_its_runs_when_it_is_cancelled(no_slurm, capsys):
    argv = ["--config-file", LEAF, *SMALL, "--setup", f"{SLEEP} 100", "OUTPUT_DIR", "out"]
    tool = str(REPOSITORY / "tools" / "submit.py")
    sweep = ["--sweep", "SEED=1,2", "--no-snapshot"]
    queue = subprocess.Popen([sys.executable, tool, *argv, *sweep], stderr=subprocess.PIPE)
    run = no_slurm / "out" / "SEED=1"
    while not (run / "slurm" / "submission.json").exists():
        assert queue.poll() is None, queue.stderr.read()
        time.sleep(0.1)
    (record,) = read_submissions(run)
    assert process_start(record["job_id"])
    assert main(["--cancel", "out"]) == 0
    assert queue.wait(30) == 130
    assert not process_start(record["job_id"])
    assert not (no_slurm / "out" / "SEED=2" / "slurm" / "submission.json").exists()
    assert main(["--status", "out"]) == 0
    assert "cancelled" in capsys.readouterr().out


@pytest.mark.slow
def test_a_local_job_carries_the_mark(no_slurm):
    argv = ["--config-file", LEAF, *SMALL, "--setup", f"{SLEEP} 100", "OUTPUT_DIR", "out"]
    assert main([*argv, "--no-snapshot"]) == 0
    (record,) = read_submissions("out")
    started = time.monotonic()
    assert main(["--cancel", "out"]) == 0
    assert not process_start(record["job_id"]) and time.monotonic() - started < 30
