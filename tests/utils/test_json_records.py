"""Tests damaged JSON files, which readers skip and writers set aside."""

import json
import os

import pytest
from damages import DAMAGES, damage

from contnet.engine.run_record import record_run
from contnet.engine.writers import read_metrics, truncate_metrics
from contnet.evaluation.progress import Progress
from contnet.evaluation.results import read_results, record_results, truncate_results
from contnet.slurm.attempt_folder import AttemptFolder, read_requeues, record_requeue
from contnet.slurm.records import add_submission, read_submissions
from contnet.utils.records import peek_record, read_record, recover_record

SUBMISSION = {
    **dict.fromkeys(("time", "host", "run_folder", "job_folder", "log", "process_start"), "x"),
    **{"cluster": "slurm", "job_id": "5", "runs": {}, "nodes": 1, "tasks": 1},
}
REQUEUE = {"job_id": "5", "restart": 0, "iteration": 3, "reason": "x"}


class Config:
    """The config values that the record of a run needs."""

    class MODEL:
        DEVICE = "cpu"

    def __init__(self, folder):
        self.OUTPUT_DIR = str(folder)


def record_result(folder):
    results = {"val": {"bbox": {"AP": 1.0}}}
    record_results(str(folder), results, iteration=3, weights=None, ema=False)


# By file: its writer, its reader, and the number of records after a write.
USERS = {
    "run.json": (
        lambda folder: record_run(Config(folder), 1, 0),
        lambda folder: json.loads((folder / "run.json").read_text()),
        1,
    ),
    "metrics.json": (lambda folder: truncate_metrics(folder, Progress(9)), read_metrics, 0),
    "results.json": (record_result, read_results, 1),
    "slurm/submission.json": (
        lambda folder: add_submission(folder, SUBMISSION),
        read_submissions,
        1,
    ),
    "slurm/requeues.json": (
        lambda folder: record_requeue(folder, REQUEUE),
        read_requeues,
        1,
    ),
}


def files_of(folder):
    """Returns everything in a folder, with its content."""
    found = {path.relative_to(folder): path for path in folder.rglob("*")}
    return {name: path.is_file() and path.read_bytes() for name, path in found.items()}


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", USERS)
def test_damaged_files(tmp_path, caplog, name, content):
    write, look, number = USERS[name]
    path = tmp_path / name
    damage(path, content)
    before = files_of(tmp_path)
    fine = (name, content) in (("metrics.json", b""), ("run.json", b"[{}]"))
    if name != "run.json":  # it has no reader
        assert look(tmp_path) == [] and look(tmp_path) == []
        assert files_of(tmp_path) == before
        said = [each.getMessage() for each in caplog.records if "skipped" in each.getMessage()]
        assert len(said) == (0 if fine else 1), "said once"
    write(tmp_path)
    if fine:
        return
    assert len(look(tmp_path)) == number
    aside = path.parent / "set_aside" / path.name
    assert aside.is_dir() if content is None else aside.read_bytes() == content
    (said,) = [each.getMessage() for each in caplog.records if "set aside" in each.getMessage()]
    assert str(path) in said and str(aside) in said and "\n" not in said


def test_good_lines_of_metrics_stay(tmp_path, caplog):
    lines = [json.dumps({"iteration": i, "loss": float("nan")}) for i in range(6)]
    path = tmp_path / "metrics.json"
    text = "\n".join([*lines[:2], lines[2][:9], "\0" * 9, *lines[3:], lines[5][:12]])
    path.write_text(text)
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [0, 1, 3, 4, 5]
    truncate_metrics(tmp_path, Progress(4))
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [0, 1, 3, 4]
    assert (tmp_path / "set_aside" / "metrics.json").read_text() == text
    truncate_metrics(tmp_path, Progress(3))
    path.write_text(path.read_text() + lines[4][:12])  # cut by a kill, which runs expect
    caplog.clear()
    truncate_metrics(tmp_path, Progress(3))
    assert len(list((tmp_path / "set_aside").iterdir())) == 1 and not caplog.records


def test_results_without_an_iteration_do_not_stop_a_resume(tmp_path):
    record_result(tmp_path)
    (record,) = read_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps([record, {**record, "iteration": None}]))
    truncate_results(tmp_path, Progress(1))
    assert [each["iteration"] for each in read_results(tmp_path)] == [None]


NOTE = {"rank": 0, "reason": "x", "details": "", "requeued": True, "status": 0, "signal": "SIGTERM"}


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["failure", "exit", "signalled"])
def test_damaged_notes_count_as_missing(tmp_path, name, content):
    folder = AttemptFolder(tmp_path, "5", 0)
    damage(folder.path / f"{name}.json", content)
    assert folder.read(name) is None
    assert folder.note(name, NOTE)
    assert folder.read(name)["rank"] == 0
    assert not folder.note(name, NOTE)


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
def test_damaged_heartbeats_count_as_missing(tmp_path, content):
    folder = AttemptFolder(tmp_path, "5", 0)
    damage(folder.rank_file(1, ".json"), content)
    assert folder.ranks() == {}
    beat = {"rank": 1, "host": "h", "pid": 7, "iteration": 4, "max_iter": 9, "phase": "training"}
    folder.write_heartbeat({**beat, "heartbeat_interval": 5, "ended": None})
    assert folder.ranks()[1]["pid"] == 7


def test_no_pipe_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "run.json")
    assert peek_record(tmp_path / "run.json", list) is None
    assert recover_record(tmp_path / "run.json", list) is None
    assert read_record(tmp_path / "run.json", list) is None
    assert (tmp_path / "set_aside" / "run.json").is_fifo()
