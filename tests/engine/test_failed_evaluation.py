"""Tests what a failed evaluation leaves, and what is found before training starts."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import QUICK, REPOSITORY, SMALL, metrics_of
from detectron2.data import DatasetCatalog, MetadataCatalog
from imagenet import make_imagenet

from contnet.data.datasets.shapes import make_shapes, shapes_datasets
from contnet.evaluation.build import EVALUATORS
from contnet.launch.main import main

OPTIONS = """
INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32 INPUT.CLASSIFIER.CROP_TEST 32
SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 4 SOLVER.CHECKPOINT_PERIOD 1000 TEST.EVAL_PERIOD 0
LOG_PERIOD 2 SOLVER.BASE_LR 0.01 DATASETS.TRAIN ('mine_train',) DATASETS.TEST ('mine_val',)
SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.5 TEST.IMS_PER_PROCESS 2
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Makes a folder with train and val, which tests copy and damage."""
    return make_imagenet(tmp_path_factory.mktemp("own"), classes=3, train=4, val=2) / "imagenet"


def said(capsys) -> tuple[str, str]:
    """Returns output and errors, except PyTorch's message about a missing GPU."""
    output, errors = capsys.readouterr()
    lines = [line for line in errors.splitlines() if "No CUDA runtime" not in line]
    return output, "\n".join(lines)


@pytest.fixture
def classify(pictures, tmp_path, capsys):
    """Trains a classifier for four iterations; returns its status, output and errors."""
    shutil.copytree(pictures, tmp_path / "data")
    sets = [[f"mine_{split}", str(tmp_path / "data" / split)] for split in ("train", "val")]
    file = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")

    def run(folder: str, *more: str) -> tuple[int, str, str]:
        own = ["DATASETS.REGISTER", str(sets), "OUTPUT_DIR", str(tmp_path / folder)]
        flags = [word for word in more if word.startswith("--")]
        values = [word for word in more if not word.startswith("--")]
        words = OPTIONS.split()
        status = main(["--config-file", file, *flags, *QUICK, *words, *own, *values])
        return status, *said(capsys)

    return run


def last_image(folder: Path) -> Path:
    return sorted((folder / "data" / "val").rglob("*.JPEG"))[-1]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / (folder / "last_checkpoint").read_text())


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("background", "period"),
    [
        ("True", "0"),
        ("False", "2"),
        pytest.param("True", "2", marks=pytest.mark.long),
        pytest.param("False", "0", marks=pytest.mark.long),
    ],
)
def test_a_failed_evaluation_costs_no_training(classify, tmp_path, background, period):
    more = ("TEST.EVAL_PERIOD", period, "SOLVER.CHECKPOINT_BACKGROUND", background)
    more = (*more, "DATASETS.CHECK_IMAGES", "none")  # the check would find it before the training
    assert classify("uncut", *more)[0] == 0
    whole = last_image(tmp_path).read_bytes()
    truncate(last_image(tmp_path))
    status, _, error = classify("cut", *more)
    (line,) = error.strip().splitlines()
    assert status == 1 and str(last_image(tmp_path)) in line
    last = 3 if period == "0" else 1
    assert (tmp_path / "cut" / "last_checkpoint").read_text() == f"model_{last:07d}.pth"
    saved = checkpoint(tmp_path / "cut")
    assert saved["trainer"]["iteration"] == last
    # While the image is damaged, nothing is trained and nothing is lost.
    assert classify("cut", *more, "--resume")[0] == 1
    assert checkpoint(tmp_path / "cut")["trainer"]["iteration"] == last

    last_image(tmp_path).write_bytes(whole)
    status, output, _ = classify("cut", *more, "--resume")
    assert status == 0
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "uncut")
    assert results(tmp_path / "cut") == results(tmp_path / "uncut")
    files = [
        sorted(path.name for path in (tmp_path / folder).glob("*.pth"))
        for folder in ("cut", "uncut")
    ]
    assert files[0] == files[1] == ["model_best.pth", "model_final.pth"]
    final, expected = checkpoint(tmp_path / "cut"), checkpoint(tmp_path / "uncut")
    for part in ("model", "ema"):
        for name, value in expected[part].items():
            assert torch.equal(final[part][name], value), name
            if last == 3:  # the resume only evaluated
                assert torch.equal(saved[part][name], value), name
    if last == 3:
        assert "iter: " not in output.replace("iter: 3 ", "")


@pytest.mark.slow
def test_checkpoints_of_evaluations_push_no_other_out(classify, tmp_path):
    more = ("TEST.EVAL_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "3", "SOLVER.CHECKPOINTS_KEPT")
    assert classify("run", *more, "2", "SOLVER.MAX_ITER", "7")[0] == 0
    names = sorted(path.name for path in (tmp_path / "run").glob("model_0*.pth"))
    assert names == ["model_0000002.pth", "model_0000005.pth"]
    for name in names:
        assert "unfinished" not in torch.load(tmp_path / "run" / name)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_images_can_be_skipped(classify, tmp_path, workers):
    more = ("DATALOADER.NUM_WORKERS", workers)
    assert classify("run", *more)[0] == 0
    (tmp_path / "run" / "log.txt").unlink()
    for image in sorted((tmp_path / "data" / "val").rglob("*.JPEG"))[-3:]:
        truncate(image)
    weights = ("MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth"), "--eval-only")
    status, _, error = classify("alone", *more, *weights)
    assert status == 1 and len(error.strip().splitlines()) == 1
    assert classify("alone", *more, *weights, "TEST.SKIP_UNREADABLE", "True")[0] == 0
    (record,) = results(tmp_path / "alone")
    assert record["skipped_images"] == 3
    (warning,) = record["warnings"]
    assert "3 of 6 images" in warning and str(last_image(tmp_path)) in warning
    assert warning in (tmp_path / "alone" / "log.txt").read_text()
    assert record["metrics"]["classification"]["top1"] <= 50


@pytest.mark.slow
def test_the_first_image_is_opened_before_the_training(classify, tmp_path):
    truncate(min((tmp_path / "data" / "val").rglob("*.JPEG")))
    status, output, error = classify("run")
    assert status == 1 and "data/val" in error and "iter: 0" not in output
    assert not (tmp_path / "run" / "last_checkpoint").exists()


# --- data sets that cannot be evaluated ----------------------------------------------------------


@pytest.fixture
def shapes(tmp_path) -> list[str]:
    folder = make_shapes(tmp_path / "shapes", num_train=2, num_val=2, max_side=200)
    return ["DATASETS.REGISTER", str(shapes_datasets(folder))]


def detect(tmp_path, capsys, *options: str) -> tuple[int, str]:
    file = str(REPOSITORY / "configs" / "retinanet_contti.yaml")
    flags = [word for word in options if word.startswith("--")]
    values = [word for word in options if not word.startswith("--")]
    sets = ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)"]
    own = ["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.MAX_ITER", "2"]
    status = main(["--config-file", file, *flags, *SMALL, *sets, *own, *values])
    return status, said(capsys)[1]


@pytest.mark.parametrize(
    "kind", ["pascal_voc", "lvis", "sem_seg", "coco_panoptic_seg", None, "own"]
)
def test_a_set_without_an_evaluator_is_refused(shapes, tmp_path, capsys, kind):
    DatasetCatalog.register("foreign", list)
    if kind:
        MetadataCatalog.get("foreign").evaluator_type = kind
    names = "('shapes_val', 'foreign')"
    status, error = detect(tmp_path, capsys, *shapes, "DATASETS.TEST", names)
    (line,) = error.strip().splitlines()
    assert status == 1 and "foreign" in line and repr(kind) in line
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_an_evaluator_whose_package_is_missing(shapes, tmp_path, capsys, monkeypatch):
    def make(cfg, name, folder):
        import lvis_package_that_is_not_there  # noqa: F401

    monkeypatch.setitem(EVALUATORS, "foreign", make)
    image = next((tmp_path / "shapes" / "val").glob("*.jpg"))
    DatasetCatalog.register("foreign", lambda: [{"file_name": str(image), "image_id": 1}])
    MetadataCatalog.get("foreign").set(evaluator_type="foreign")
    status, error = detect(tmp_path, capsys, *shapes, "DATASETS.TEST", "('foreign',)")
    (line,) = error.strip().splitlines()
    assert status == 1 and "lvis_package_that_is_not_there" in line
    assert not list((tmp_path / "run").glob("model*"))


@pytest.mark.slow
@pytest.mark.parametrize("content", [{}, {"annotations": []}], ids=["no list", "an empty one"])
def test_without_annotations_results_are_written(shapes, tmp_path, capsys, content):
    assert detect(tmp_path, capsys, *shapes)[0] == 0
    file = tmp_path / "shapes" / "annotations" / "instances_val.json"
    truth = json.loads(file.read_text())
    del truth["annotations"]
    file.write_text(json.dumps(truth | content))
    # Not during training.
    status, error = detect(tmp_path, capsys, *shapes, "OUTPUT_DIR", str(tmp_path / "again"))
    (line,) = error.strip().splitlines()
    assert status == 1 and "shapes_val" in line and "no annotations" in line
    out = tmp_path / "alone"
    weights = ["--eval-only", "MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth")]
    assert detect(tmp_path, capsys, *shapes, *weights, "OUTPUT_DIR", str(out)) == (0, "")
    (written,) = (out / "inference" / "shapes_val").iterdir()
    rows = json.loads(written.read_text())
    assert re.fullmatch(r"detections_.*_results\.json", written.name)
    assert all(row.keys() == {"image_id", "category_id", "bbox", "score"} for row in rows)
    (record,) = results(out)
    assert record["metrics"] == {}
    assert str(written) in record["warnings"][0] and "no metrics" in record["warnings"][0]


# --- contents of the log -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_log_of_a_training(shapes, tmp_path, capsys, monkeypatch):
    """The terminal shows colours, and the log period is never reached."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    options = ["SOLVER.MAX_ITER", "3", "LOG_PERIOD", "100", "TEST.EVAL_PERIOD", "0"]
    assert detect(tmp_path, capsys, *shapes, *options)[0] == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "\x1b" not in log
    lines = [line for line in log.splitlines() if re.search(r"iter: \d", line)]
    assert re.search(r"eta: \d+:\d\d:\d\d  iter: 0  .*total_loss: \d", lines[0])
    assert "not smoothed" in lines[0] and "medians of the last 20" in lines[-1]
    assert [int(re.search(r"iter: (\d+)", line)[1]) for line in lines] == [0, 2]
    entries = [line for line in log.splitlines() if line.startswith("[")]
    assert len(set(entries)) == len(entries)  # each entry by one handler
    assert [line["iteration"] for line in metrics_of(tmp_path / "run")] == [2]
    (record,) = results(tmp_path / "run")
    (last,) = metrics_of(tmp_path / "run")
    assert record["loss"] == {"total_loss": last["total_loss"], "smoothed": False}
    assert {"AR@1", "AR@10", "AR@100", "ARs", "ARm", "ARl"} <= record["metrics"]["bbox"].keys()
    assert last["bbox/AR@100"] == record["metrics"]["bbox"]["AR@100"]


@pytest.mark.slow
def test_a_class_of_any_name_is_trained_and_shown(shapes, tmp_path, capsys):
    """The name is escaped in the log, in tables and in the tags of TensorBoard."""
    name = "cat\x1b[2J\r\n[11/29 error]: gone\u202egpj\u2028\x9b\ud800"
    for file in (tmp_path / "shapes").rglob("*.json"):
        content = json.loads(file.read_text())
        if "categories" in content:
            content["categories"][0]["name"] = name
            file.write_text(json.dumps(content))
    assert detect(tmp_path, capsys, *shapes)[0] == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert all(char.isprintable() or char in "\n\t" for char in log)
    shown = r"cat\x1b[2J\r\n[11/29 error]: gone\u202egpj\u2028\x9b\ud800"
    assert f"| {shown} |" in log and not re.search(r"^\[11/29 error", log, re.MULTILINE)
    assert f"bbox/AP-{shown}" in metrics_of(tmp_path / "run")[-1]
    assert results(tmp_path / "run")[0]["metrics"]["bbox"].keys() >= {f"AP-{shown}"}
