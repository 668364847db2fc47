"""Tests real jobs of tools/submit.py on this machine."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import REPOSITORY, SMALL
from submissions import LEAF, error_of

from contnet.data.datasets.shapes import make_shapes
from contnet.slurm.attempt_folder import last_saved_iteration
from contnet.slurm.describe import describe_run
from contnet.slurm.executors import local_executor, submit_jobs
from contnet.slurm.local_queue import run_queue
from contnet.slurm.records import read_submissions
from contnet.slurm.settings import ClusterSettings
from contnet.slurm.status import read_status
from contnet.slurm.submit import main
from contnet.utils.processes import process_start

pytest_plugins = ["submissions"]


def test_local_takes_one_machine(no_slurm, capsys):
    options = ["--num-nodes", "2", *SMALL]
    line = error_of(capsys, "--config-file", LEAF, *options)
    assert "--num-nodes is 2" in line
    line = error_of(capsys, "--config-file", LEAF, "--cluster", "slurm", *SMALL)
    assert "--cluster local" in line


IMAGES_OPTIONS = """
MODEL.DEVICE cpu MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 56 DATALOADER.NUM_WORKERS 0
INPUT.CLASSIFIER.RESIZE_TEST 64 INPUT.CLASSIFIER.CROP_TEST 56 SOLVER.IMS_PER_BATCH 4
SOLVER.MAX_ITER 3 SOLVER.WARMUP_ITERS 1 LOG_PERIOD 1
"""
IMAGES = IMAGES_OPTIONS.split()
QUICK = [*SMALL, "SOLVER.BASE_LR", "0.0001", "SOLVER.STEPS", "()", "LOG_PERIOD", "1"]


def run_tool(tool: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a tool in a separate process, as on a machine without SLURM."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / tool), *argv],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )


def processes_of(folder: Path) -> list[str]:
    """Returns the processes whose command line contains a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command and int(path.name) != os.getpid():
            found.append(command)
    return found


@pytest.fixture
def project(tmp_path) -> Path:
    """Copies the package and the tools, so that tests can edit them."""
    root = tmp_path / "project"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "projects" / "ConTNet", root, ignore=ignored)
    return root


@pytest.mark.long
def test_the_snapshot_runs_here_in_two_processes(no_slurm, coco_root, project, capsys):
    """The code is broken after the submission; the job does not notice and reports its result."""
    out = no_slurm / "out"
    options = [
        "--num-gpus",
        "2",
        "SOLVER.MAX_ITER",
        "3",
        "OUTPUT_DIR",
        "out",
        "--max-requeues",
        "2",
    ]
    options += ["--setup", "export OF_THE_SETUP=1", "--setup", "echo from the setup"]
    environment = {"PYTHONPATH": str(project), "DETECTRON2_DATASETS": str(coco_root)}
    done = run_tool("submit.py", "--config-file", LEAF, *QUICK, *options, **environment)
    assert done.returncode == 0, done.stderr
    assert "sbatch not found: running on this machine" in done.stdout
    (project / "contnet" / "__init__.py").write_text("raise RuntimeError('edited')\n")
    status = main(["--status", "out", "--watch"])
    followed = capsys.readouterr().out
    assert status == 0, followed[-3000:]
    assert "iter: 2" in followed
    assert followed.splitlines()[-1].endswith("finished")
    (start,) = json.loads((out / "run.json").read_text())
    assert start["processes"] == 2
    (record,) = read_submissions(out)
    assert "from the setup" in (out / "slurm" / "submission1" / "setup.log").read_text()
    assert record["code"].startswith(str(out))
    assert main(["--status", "out"]) == 0
    shown = capsys.readouterr().out
    assert "state    finished" in shown and "iteration 3 of 3" in shown
    wait_for(lambda: not processes_of(out))


@pytest.mark.long
def test_without_snapshot_the_code_is_as_the_job_finds_it(no_slurm, coco_root, project):
    environment = {"PYTHONPATH": str(project), "DETECTRON2_DATASETS": str(coco_root)}
    broken = "--setup", f"echo 'raise RuntimeError(1)' > {project}/contnet/slurm/job.py"
    argv = ["--config-file", LEAF, *QUICK, "--no-snapshot", *broken, "OUTPUT_DIR", "out", "--watch"]
    done = run_tool("submit.py", *argv, **environment)
    assert done.returncode == 1
    assert not (no_slurm / "out" / "slurm" / "submission1" / "code").exists()
    assert "RuntimeError: 1" in done.stdout


@pytest.mark.slow
def test_cancel_on_this_machine_leaves_nothing(no_slurm, capsys):
    out = no_slurm / "out"
    argv = ["--config-file", LEAF, *QUICK, "--num-gpus", "2", "SOLVER.MAX_ITER", "9999"]
    argv += ["OUTPUT_DIR", "out"]
    assert main(argv) == 0
    metrics = out / "metrics.json"
    wait_for(lambda: metrics.exists() and metrics.read_text())  # an iteration is finished
    assert len(processes_of(out)) >= 3  # submitit's process, and two tasks
    assert "in use by job" in error_of(capsys, *argv)
    assert main(["--cancel", "out"]) == 0
    assert "cancelled job" in capsys.readouterr().out
    wait_for(lambda: not processes_of(out))
    # It has saved its progress, and is not started again.
    status = read_status(out)
    saved = f"saved after iteration {status['iteration']}; not requeued"
    assert status["state"] == "stopped" and saved in status["exit"]["reason"]
    assert last_saved_iteration(out) == status["iteration"] and not status["requeues"]
    assert main(["--status", "out"]) == 0
    assert f"state    cancelled: {saved}" in capsys.readouterr().out
    assert "nothing to cancel" in error_of(capsys, "--cancel", "out")


def test_attempts_on_this_machine_are_bounded_by_the_user_alone(no_slurm):
    """submitit's own limit is six."""
    settings = ClusterSettings(max_requeues=7)
    python = shlex.quote(sys.executable)
    options = {"tasks": 1, "gpus": [], "environment": {}, "python": python}
    executor = local_executor(no_slurm / "jobs", settings, **options)
    start = "open('attempts', 'a').write('x'); import sys; sys.exit(144)"
    (job_id,) = submit_jobs(executor, [partial(exec, start)])
    wait_for(lambda: not process_start(int(job_id)))
    assert (no_slurm / "attempts").read_text() == 8 * "x"


@pytest.mark.long
def test_a_resumed_attempt_uses_what_the_submission_has_read(no_slurm):
    """The config file is changed before the job starts, and removed before its second attempt."""
    out, mine = no_slurm / "out", no_slurm / "mine.yaml"
    drawn = make_shapes(no_slurm / "drawn", num_train=4, num_val=2)
    sets = [["mine", str(drawn / "annotations" / "instances_train.json"), str(drawn / "train")]]
    data = {"REGISTER": sets, "TRAIN": ["mine"], "TEST": []}
    solver = {"MAX_ITER": 60, "REFERENCE_WORLD_SIZE": 2, "CHECKPOINT_PERIOD": 1000}
    mine.write_text(yaml.safe_dump({"_BASE_": LEAF, "DATASETS": data, "SOLVER": solver}))
    argv = ["--config-file", "mine.yaml", *QUICK, "SOLVER.IMS_PER_BATCH", "4", "--no-snapshot"]
    assert main([*argv, "OUTPUT_DIR", "out"]) == 0
    mine.write_text("SOLVER: {MAX_ITER: 3}")
    wait_for(lambda: read_status(out).get("iteration", -1) >= 1)
    mine.unlink()
    os.kill(read_status(out)["ranks"][0]["pid"], signal.SIGUSR2)
    wait_for(lambda: not processes_of(out))
    status = read_status(out)
    assert status["state"] == "finished", status["failure"]
    assert (status["restart"], len(status["requeues"])) == (1, 1)
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["SOLVER"]["MAX_ITER"] == 120 and saved["SOLVER"]["IMS_PER_BATCH"] == 2
    log = (out / "log.txt").read_text()
    assert log.count("MODEL.ROI_HEADS.NUM_CLASSES 4: the number of classes of mine") == 2
    assert log.count("scaled to 1 process: ") == 2


@pytest.mark.slow
def test_a_failing_setup_is_in_the_status(no_slurm, capsys):
    argv = ["--config-file", LEAF, *QUICK, "--setup", "no-such-module", "OUTPUT_DIR", "out"]
    assert main([*argv, "--no-snapshot", "--watch"]) == 1
    assert main(["--status", "out"]) == 0
    shown = capsys.readouterr().out
    assert "state    never started" in shown
    assert "the set-up command failed: no-such-module" in shown


@pytest.mark.slow
def test_a_killed_process_ends_the_others(no_slurm):
    """This also works before the rendezvous."""
    out = no_slurm / "out"
    argv = ["--config-file", LEAF, *QUICK, "--num-gpus", "2", "OUTPUT_DIR", "out"]
    assert main([*argv, "--no-snapshot"]) == 0
    wait_for(lambda: 1 in read_status(out).get("ranks", {}))
    os.kill(read_status(out)["ranks"][1]["pid"], signal.SIGKILL)
    wait_for(lambda: not processes_of(out))
    assert describe_run(out).startswith("failed: rank 1 (process")


@pytest.mark.slow
def test_sweep_on_this_machine(no_slurm, capsys):
    """One run fails; the others continue, and the table shows the reason."""
    bad = "SOLVER.BASE_LR=0.0001,1e30"
    argv = ["--config-file", LEAF, *QUICK, "SOLVER.MAX_ITER", "3", "SOLVER.WARMUP_ITERS", "0"]
    argv += ["--sweep", bad, "--max-parallel", "2", "OUTPUT_DIR", "out"]
    assert main(argv) == 1
    assert "BASE_LR=0.0001: finished" in capsys.readouterr().out
    table = run_tool("results.py", "out").stdout.splitlines()
    assert sum("BASE_LR=" in line and line.startswith("|") for line in table) == 2
    assert [line for line in table if "BASE_LR=0.0001 | finished" in line and "| 3 |" in line]
    assert [line for line in table if "1e30 | failed: the loss is not finite" in line]


@pytest.mark.long
def test_a_classifier_trains_here_too(no_slurm, imagenet_root, monkeypatch, capsys):
    leaf = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
    status = main(["--config-file", leaf, *IMAGES, "OUTPUT_DIR", "out", "--watch"])
    assert status == 0, capsys.readouterr().out[-3000:]
    (record,) = json.loads((no_slurm / "out" / "results.json").read_text())
    assert record["metrics"]["classification"].keys() == {"top1", "top5"}


def wait_for(condition) -> None:
    """Waits, for example for the start of two processes, on a busy machine."""
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_an_interrupt_counts_though_nobody_reads_the_output(tmp_path, monkeypatch):
    record = {"time": "now", "job_id": str(os.getpid()), "runs": {}, "cancelled": "now"}
    record |= {"cluster": "local", "run_folder": str(tmp_path), "job_folder": str(tmp_path)}
    record |= {"log": "log", "host": "h", "nodes": 1, "tasks": 1, "process_start": ""}
    plan = SimpleNamespace(
        pending=[None], runs=[], parallel=0, base=tmp_path, record=lambda *_: record
    )
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr("sys.stdout", open(writer, "w"))  # noqa: SIM115
    with pytest.raises(KeyboardInterrupt):
        run_queue(plan)
