"""Tests TRACKERS offline: an interrupted and resumed run is one tracked run, without duplicates."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, REPOSITORY, metrics_of
from PIL import Image

from contnet.engine.hooks import LauncherHook
from contnet.launch.arguments import build_run_settings, parse_arguments
from contnet.launch.main import main as train
from contnet.launch.run import run

OPTIONS = """
MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32
INPUT.CLASSIFIER.CROP_TEST 32 SOLVER.MAX_ITER 7 SOLVER.CHECKPOINT_PERIOD 3 TEST.EVAL_PERIOD 5
LOG_PERIOD 2 TEST.LOSS_PERIOD 6 SOLVER.BASE_LR 0.01
"""
LEAF = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def settings(imagenet_root, tmp_path, monkeypatch):
    """Makes settings of a run that is tracked locally."""
    for name, value in {
        "DETECTRON2_DATASETS": str(imagenet_root),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_EXPERIMENT_NAME": "shapes",
        "MLFLOW_TRACKING_URI": f"file:{tmp_path / 'mlruns'}",
        "WANDB_API_KEY": KEY,
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": "shapes",
    }.items():
        monkeypatch.setenv(name, value)

    def make(trackers, *more):
        words = [*QUICK, *OPTIONS.split(), "OUTPUT_DIR", str(tmp_path / "run")]
        words = ["--config-file", LEAF, *words, "TRACKERS", str(trackers), *more]
        return build_run_settings(parse_arguments(words))

    return make


class Cut(LauncherHook):
    """Ends a run between two checkpoints, after an evaluation."""

    def after_step(self):
        if self.trainer.iter == 4:
            raise InterruptedError


def expected(folder: Path) -> dict:
    """Returns metrics by name and iteration, except times."""
    return {
        (key, line["iteration"]): value
        for line in metrics_of(folder)
        for key, value in line.items()
        if key != "iteration"
    }


# --- MLflow --------------------------------------------------------------------------------------


def of_mlflow(tmp_path):
    """Returns the only run of the experiment, and its metrics by name and iteration."""
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("shapes")
    (found,) = client.search_runs([experiment.experiment_id])
    points = [
        point
        for key in found.data.metrics
        for point in client.get_metric_history(found.info.run_id, key)
    ]
    counts = Counter((point.key, point.step) for point in points)
    assert set(counts.values()) == {1}
    return found, {(point.key, point.step): point.value for point in points}


def assert_equal(found: dict, wanted: dict) -> None:
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    assert {step for _, step in found} == {step for _, step in wanted}


def test_mlflow_goes_on_with_its_run(settings, tmp_path):
    with pytest.raises(InterruptedError):
        run(settings(["mlflow"]), Cut())
    found, before = of_mlflow(tmp_path)
    assert found.info.status == "KILLED"
    assert max(step for _, step in before) == 4
    run(settings(["mlflow"], "--resume"))
    found, after = of_mlflow(tmp_path)
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert found.data.params["SOLVER.BASE_LR"] == "0.01"
    assert_equal(after, expected(tmp_path / "run"))
    assert ("classification/top1", 4) in after and ("validation/total_loss", 5) in after
    files = list((tmp_path / "mlruns").rglob("prediction_*.png"))
    steps = Counter(int(file.name.split("+step+")[1].split("+")[0]) for file in files)
    assert steps == {4: 4, 6: 4}
    picture = np.asarray(Image.open(files[0]).convert("RGB"))
    assert picture.std() > 10


def test_a_tracker_that_fails_gets_what_it_lacks_later(settings, tmp_path):
    """The disk is gone between iterations 2 and 4."""
    place, away = tmp_path / "mlruns", tmp_path / "away"

    class Away(Cut):
        def after_step(self):
            if self.trainer.iter == 2:
                place.rename(away)
                place.write_text("full")
            super().after_step()

    with pytest.raises(InterruptedError):
        run(settings(["mlflow"]), Away())
    assert "TRACKERS mlflow fails" in (tmp_path / "run" / "log.txt").read_text()
    place.unlink()
    away.rename(place)
    assert max(step for _, step in of_mlflow(tmp_path)[1]) == 1
    run(settings(["mlflow"], "--resume"))
    assert_equal(of_mlflow(tmp_path)[1], expected(tmp_path / "run"))


def test_another_config_is_another_run(settings, tmp_path):
    """A new start with the same config continues the run."""
    short = ("SOLVER.CHECKPOINT_PERIOD", "100", "TEST.EVAL_PERIOD", "0")
    for _ in range(2):
        with pytest.raises(InterruptedError):
            run(settings(["mlflow"], *short), Cut())
    of_mlflow(tmp_path)
    with pytest.raises(InterruptedError):
        run(settings(["mlflow"], *short, "SOLVER.BASE_LR", "0.02"), Cut())
    assert len(list((tmp_path / "mlruns").glob("*/*/metrics"))) == 2


# --- Weights & Biases ----------------------------------------------------------------------------


def records_of(file: Path):
    """Reads the records of a .wandb file, which has the format of LevelDB logs."""
    from wandb.proto import wandb_internal_pb2

    data, position, block, parts = file.read_bytes(), 7, 32768, b""
    while position + 7 <= len(data):
        if block - position % block < 7:  # too short for a header
            position += block - position % block
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a complete record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def of_wandb(folder: Path):
    """Returns the run ids in the files for upload, and the rows of their history."""
    ids, rows = set(), []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in records_of(file):
            ids |= {record.run.run_id} - {""}
            if items := record.history.item:
                row = {each.key or "/".join(each.nested_key): each.value_json for each in items}
                rows.append({key: json.loads(value) for key, value in row.items()})
    return ids, rows


def test_wandb_goes_on_with_its_run(settings, tmp_path):
    with pytest.raises(InterruptedError):
        run(settings(["wandb"]), Cut())
    run(settings(["wandb"], "--resume"))
    ids, rows = of_wandb(tmp_path / "run")
    assert len(ids) == 1
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    found = {
        (key, row["_step"]): value
        for row in rows
        for key, value in row.items()
        if not key.startswith(("_", "predictions"))
    }
    assert_equal(found, expected(tmp_path / "run"))
    key = "predictions/count"
    assert {row["_step"]: row[key] for row in rows if key in row} == {4: 4, 6: 4}


def test_no_file_has_a_key(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run(settings(["wandb", "mlflow"]))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["wandbb"], ["mlflow", "mlflow"]])
def test_names_are_checked(names, tmp_path, capsys):
    words = [*QUICK, *OPTIONS.split(), "OUTPUT_DIR", str(tmp_path), "TRACKERS", str(names)]
    assert train(["--config-file", LEAF, *words]) == 2
    assert "TRACKERS" in capsys.readouterr().err


def test_a_tracker_that_does_not_begin(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'file'}/mlruns")
    (tmp_path / "file").write_text("")
    words = [
        *QUICK,
        *OPTIONS.split(),
        "OUTPUT_DIR",
        str(tmp_path / "run"),
        "TRACKERS",
        "['mlflow']",
    ]
    assert train(["--config-file", LEAF, *words]) == 1
    error = capsys.readouterr().err
    assert "TRACKERS mlflow cannot start" in error and "Traceback" not in error
