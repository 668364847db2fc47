"""Tests the settings of a run: read and completed once, and the same in every process."""

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, SMALL
from launchers import STEP

from contnet.data.datasets.shapes import make_shapes
from contnet.launch.arguments import build_run_settings, parse_arguments
from contnet.launch.distributed import launch_run
from contnet.launch.main import main
from contnet.launch.run import run

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
CLASSES = "MODEL.ROI_HEADS.NUM_CLASSES"


@pytest.fixture
def drawn(tmp_path) -> Path:
    return make_shapes(tmp_path / "set", num_train=4, num_val=2)


def _arguments(drawn: Path, folder: Path) -> list[str]:
    """Writes a config with a recipe for one process, and data with another number of classes."""
    file = drawn / "mine.yaml"
    sets = [["mine", str(drawn / "annotations" / "instances_train.json"), str(drawn / "train")]]
    content = {
        "_BASE_": LEAF,
        "DATASETS": {"REGISTER": sets, "TRAIN": ["mine"], "TEST": []},
        "SOLVER": {"REFERENCE_WORLD_SIZE": 1, "BASE_LR": 0.001, "MAX_ITER": 2, "STEPS": []},
    }
    file.write_text(yaml.safe_dump(content))
    return ["--config-file", str(file), *SMALL, "OUTPUT_DIR", str(folder)]


def test_settings_are_finished(drawn, tmp_path):
    args = parse_arguments([*_arguments(drawn, tmp_path / "run"), "--num-gpus", "2"])
    before = copy.deepcopy(vars(args))
    settings = build_run_settings(args)
    assert vars(args) == before
    solver = settings.cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (4, 0.002, 1)
    assert settings.cfg.MODEL.ROI_HEADS.NUM_CLASSES == 4
    counted, scaled = settings.notes
    assert counted == f"{CLASSES} 4: the number of classes of mine"
    assert scaled.startswith("scaled to 2 processes: ")
    for change in ("IMS_PER_BATCH 2 -> 4", "BASE_LR 0.001 -> 0.002", "MAX_ITER 2 -> 1"):
        assert f"SOLVER.{change}" in scaled
    assert settings.cfg.is_frozen()
    again = pickle.loads(pickle.dumps(settings))
    assert again == settings and again.cfg.is_frozen()


def test_a_launcher_decides_what_a_recipe_is_scaled_to(drawn, tmp_path, monkeypatch):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    settings = build_run_settings(parse_arguments(_arguments(drawn, tmp_path / "run")))
    assert settings.processes.world_size == 4
    assert settings.cfg.SOLVER.IMS_PER_BATCH == 8


@pytest.mark.slow
def test_processes_use_what_the_first_one_has_read(drawn, tmp_path, monkeypatch):
    """The files change before the processes start, which would otherwise read other settings."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path / "run"
    args = parse_arguments([*_arguments(drawn, folder), "--num-gpus", "2"])
    settings = build_run_settings(args)
    Path(args.config_file).write_text("SOLVER: {MAX_ITER: 7}")
    annotations = drawn / "annotations" / "instances_train.json"
    content = json.loads(annotations.read_text())
    content["categories"].append({"id": 99, "name": "one more"})
    annotations.write_text(json.dumps(content))
    launch_run(run, settings, settings.processes, "cpu")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 4
    assert saved == yaml.safe_load(settings.cfg.dump())
    log = (folder / "log.txt").read_text()
    for line in settings.notes:
        assert line in log
    assert "MAX_ITER 2 -> 1" in log and str(args.config_file) in log


def test_train_net_in_one_process_logs_its_notes(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path / "run"
    assert main(_arguments(drawn, folder)) == 0
    log = (folder / "log.txt").read_text()
    assert f"{CLASSES} 4: the number of classes of mine" in log
    assert "scaled to" not in log


def test_the_config_of_a_training_is_replaced_whole_and_by_no_evaluation(
    drawn, tmp_path, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path / "run"
    options = ["DATASETS.TEST", "('mine',)", "SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0"]
    assert main([*_arguments(drawn, folder), *options]) == 0
    saved = (folder / "config.yaml").read_bytes()
    options += ["MODEL.WEIGHTS", str(folder / "model_final.pth"), "TEST.DETECTIONS_PER_IMAGE", "7"]
    assert main([*_arguments(drawn, folder), *options, "--eval-only"]) == 0
    assert (folder / "config.yaml").read_bytes() == saved
    assert main([*_arguments(drawn, tmp_path / "alone"), *options, "--eval-only"]) == 0
    assert "DETECTIONS_PER_IMAGE: 7" in (tmp_path / "alone" / "config.yaml").read_text()
    os.link(folder / "config.yaml", tmp_path / "before.yaml")  # a resume replaces the file
    assert main([*_arguments(drawn, folder), "SOLVER.MAX_ITER", "2", "--resume"]) == 0
    assert "MAX_ITER: 2" in (folder / "config.yaml").read_text()
    assert (tmp_path / "before.yaml").read_bytes() == saved
