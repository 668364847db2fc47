"""Tests damaged files of a run, which must never cause a traceback."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from conftest import QUICK, REPOSITORY, metrics_of
from damage import damaged, damaged_json, each_nested, run_command
from hypothesis import given, settings
from hypothesis import strategies as st

from contnet.commands import results
from contnet.launch.main import main as train
from contnet.slurm import submit
from contnet.slurm.attempt_folder import AttemptFolder, record_requeue
from contnet.slurm.cluster import Job
from contnet.slurm.lease import Lease
from contnet.slurm.records import add_submission

JOB = "7"
RUN_FILES = ("run.json", "metrics.json", "results.json")
JOB_FILES = (
    *("lease/000002/owner.json", "slurm/submission.json", "slurm/requeues.json"),
    *(f"slurm/attempts/{JOB}-000/{name}.json" for name in ("rank-00000", "failure", "exit")),
)
OTHERS = ("config.yaml", "last_checkpoint")
OPTIONS = """
MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32
INPUT.CLASSIFIER.CROP_TEST 32 SOLVER.IMS_PER_BATCH 4 SOLVER.CHECKPOINT_PERIOD 1 TEST.EVAL_PERIOD 1
LOG_PERIOD 1 SOLVER.WARMUP_ITERS 1 SOLVER.WARMUP_FACTOR 0.1 SOLVER.CHECKPOINTS_KEPT 1
"""


def _argv(folder: Path, iterations: int, *more: str) -> list[str]:
    leaf = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
    options = [*QUICK, *OPTIONS.split(), "SOLVER.MAX_ITER", str(iterations)]
    return ["--config-file", leaf, *options, "OUTPUT_DIR", str(folder), *more]


def _add_job(folder: Path) -> None:
    """Adds the files of a failed job to a run's folder."""
    record = {"time": "now", "cluster": "local", "host": socket.gethostname(), "job_id": JOB}
    record |= {"runs": {}, "run_folder": str(folder), "job_folder": str(folder), "command": []}
    record |= {"log": str(folder / "log.txt"), "nodes": 1, "tasks": 1, "process_start": "gone"}
    add_submission(folder, record)
    attempt = AttemptFolder(folder, JOB, 0)
    attempt.path.mkdir(parents=True)
    lease = Lease(folder, Job("local", JOB))
    lease.take()
    rank = {"rank": 0, "host": socket.gethostname(), "pid": 2**22 + 1, "phase": "training"}
    rank |= {"iteration": 1, "max_iter": 2, "heartbeat_interval": 10.0, "ended": "failed"}
    attempt.write_heartbeat(rank)
    ended = {"rank": 0, "iteration": 1, "phase": "training", "reason": "tired", "details": ""}
    attempt.note("failure", {**ended, "lost": False})
    attempt.note("exit", {**ended, "requeued": False, "status": 1})
    record_requeue(folder, {"job_id": JOB, "restart": 0, "iteration": 1, "reason": "told to"})
    lease.release()


@pytest.fixture(scope="module")
def finished(imagenet_root, tmp_path_factory) -> Path:
    """Returns a finished run of a job, with all its files."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
        status, said = run_command(train, *_argv(folder, 2))
    assert status == 0, said[-3000:]
    _add_job(folder)
    return folder


def _copy(source: str, target: str) -> None:
    (os.link if source.endswith(".pth") else shutil.copy2)(source, target)


def _damage(finished: Path, folder: Path, names: tuple[str, ...], data: st.DataObject) -> str:
    """Copies the run with one damaged file, and returns the name of the file."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, folder, copy_function=_copy)
    name = data.draw(st.sampled_from(names))
    how = damaged_json if name.endswith(".json") else damaged
    (folder / name).write_bytes(data.draw(how((finished / name).read_bytes())))
    return name


@given(st.data())
def test_status_and_table(finished, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    _damage(finished, folder, (*RUN_FILES, *JOB_FILES, *OTHERS), data)
    run_command(submit.main, "--status", str(folder))
    run_command(results.main, str(folder))
    run_command(results.main, str(folder), "--json", "--cost", "--group-by-seed")


@pytest.mark.parametrize("name", ["results.json", *JOB_FILES])
def test_each_value_of_another_kind(finished, tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, folder, copy_function=_copy)
    for value in each_nested(json.loads((finished / name).read_text())):
        (folder / name).write_text(json.dumps(value))
        run_command(submit.main, "--status", str(folder))
        run_command(results.main, str(folder))


@settings(max_examples=max(settings().max_examples // 8, 1))
@given(st.data())
def test_resume(finished, imagenet_root, tmp_path_factory, monkeypatch, data):
    """A resume works with damaged records, but may fail with another last_checkpoint."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
    folder = tmp_path_factory.getbasetemp() / "damaged"
    name = _damage(finished, folder, (*RUN_FILES, *JOB_FILES, *OTHERS), data)
    status, said = run_command(train, *_argv(folder, 3, "--resume"))
    if status:
        assert name not in RUN_FILES and "error: " in said, said[-3000:]
    else:
        assert metrics_of(folder)[-1]["iteration"] == 2
        assert (folder / "model_final.pth").exists()
