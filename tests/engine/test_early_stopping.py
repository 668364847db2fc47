"""Tests TEST.PATIENCE: training stops early, at the same iteration after a resume."""

import json
from pathlib import Path

import pytest
import torch
from conftest import QUICK, REPOSITORY, metrics_of
from equality import equal

from contnet.evaluation.evaluate import Evaluator
from contnet.launch.main import main as train
from contnet.utils.errors import UserError

LEAF = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
# The EMA does not change: the first of the evaluations after iterations 1, 3, 5 is the best.
OPTIONS = """
MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32
INPUT.CLASSIFIER.CROP_TEST 32 SOLVER.WARMUP_ITERS 1 SOLVER.WARMUP_FACTOR 0.1 SOLVER.MAX_ITER 20
SOLVER.CHECKPOINT_PERIOD 3 SOLVER.CHECKPOINTS_KEPT 9 LOG_PERIOD 1 TEST.EVAL_PERIOD 2
TEST.PATIENCE 3 SOLVER.BASE_LR 0.001 SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.99999999
"""


@pytest.fixture
def run(imagenet_root, tmp_path, monkeypatch):
    """Trains in a subfolder of tmp_path, which is returned."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))

    def run(name: str, *words: str) -> Path:
        folder = tmp_path / name
        options = [*QUICK, *OPTIONS.split(), "OUTPUT_DIR", str(folder)]
        assert train(["--config-file", LEAF, *options, *words]) == 0
        return folder

    return run


def results_of(folder: Path) -> list[tuple[int, bool]]:
    """Returns the iteration of each evaluation, and whether it evaluated a file."""
    records = json.loads((folder / "results.json").read_text())
    return [(record["iteration"], record["weights"] is not None) for record in records]


def last_state(folder: Path) -> dict:
    content = torch.load(folder / "model_final.pth")
    del content["contnet"]  # the folder is different
    return content


EARLY = [(1, False), (3, False), (5, False), (7, False), (1, True)]


def test_it_ends_after_the_patience_and_evaluates_the_best(run):
    folder = run("run")
    assert metrics_of(folder)[-1]["iteration"] == 7
    assert results_of(folder) == EARLY
    records = json.loads((folder / "results.json").read_text())
    assert records[-1]["metrics"] == records[0]["metrics"]
    assert Path(records[-1]["weights"]) == folder / "model_best.pth"
    assert torch.load(folder / "model_final.pth")["trainer"]["iteration"] == 7
    # A resume trains no further, and only makes up missing evaluations.
    run("run", "--resume")
    assert results_of(folder) == EARLY and metrics_of(folder)[-1]["iteration"] == 7
    (folder / "results.json").write_text(json.dumps(records[:-1]))
    run("run", "--resume")
    assert results_of(folder) == EARLY


@pytest.mark.parametrize(
    "checkpoint",
    ["model_0000002.pth", pytest.param("model_0000005.pth", marks=pytest.mark.long)],
)
def test_a_resumed_training_ends_at_the_same_iteration(run, checkpoint):
    folder = run("run")
    whole = last_state(folder)
    run("run", "--resume-from", str(folder / checkpoint))
    assert equal(last_state(folder), whole)
    assert sorted(results_of(folder)) == sorted(EARLY)


def test_a_resume_without_patience_goes_on(run):
    folder = run("run")
    run("run", "--resume", "TEST.PATIENCE", "0")
    assert metrics_of(folder)[-1]["iteration"] == 19
    assert not results_of(folder)[-1][1]


def test_cut_off_in_the_evaluation_that_ends_it(run, monkeypatch):
    whole = last_state(run("whole"))
    evaluate = Evaluator.evaluate

    def fail(*args, **facts):
        if facts["iteration"] == 7:
            raise UserError("the disk is broken")
        return evaluate(*args, **facts)

    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(Evaluator, "evaluate", fail)
        run("run")
    folder = run("run", "--resume")
    assert equal(last_state(folder), whole) and results_of(folder) == EARLY


def test_a_run_from_another_folder_has_no_best_file(run):
    folder = run("run")
    other = run("other", "--resume-from", str(folder / "model_0000005.pth"))
    assert results_of(other) == [(7, False)]


@pytest.mark.long
def test_two_processes_end_together(run):
    folder = run("run", "--num-gpus", "2", "SOLVER.IMS_PER_BATCH", "4")
    assert results_of(folder) == EARLY
    assert torch.load(folder / "model_final.pth")["trainer"]["iteration"] == 7


def test_patience_without_evaluations_is_refused(tmp_path, capsys):
    options = [*QUICK, *OPTIONS.split(), "TEST.EVAL_PERIOD", "0"]
    assert train(["--config-file", LEAF, *options, "OUTPUT_DIR", str(tmp_path)]) == 2
    assert "TEST.EVAL_PERIOD" in capsys.readouterr().err
