"""Tests that users' mistakes end in a one-line error with advice, before any heavy work."""

import json
import shutil
import subprocess

import pytest
import torch
from conftest import REPOSITORY, SMALL

from contnet.launch.main import main

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")


@pytest.fixture
def here(coco_here, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "")
    return coco_here


@pytest.fixture
def broken_root(here, coco_root):
    """Replaces the tiny COCO by a copy, which tests can damage."""
    (whole,) = (path for path in here.rglob("coco") if path.is_symlink())
    whole.unlink()
    shutil.copytree(coco_root / "coco", whole)
    return whole.parent


def _error(capsys, *argv: str, status: int = 1) -> str:
    """Runs main with a mistake in ``argv``; returns the error line."""
    assert main(list(argv)) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["MODEL.CONTNET.VARIENT", "contnet_m"],
            ["MODEL.CONTNET.VARIENT", "MODEL.CONTNET.VARIANT"],
        ),
        (["SOLVER.BASE_LR"], ["SOLVER.BASE_LR"]),
        (["SOLVER.BASE_LR=0.1"], ["SOLVER.BASE_LR"]),
        (["MODEL.CONTNET.TAPS", "all"], ["MODEL.CONTNET.TAPS", "stage", "pre"]),
        (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER", "many"]),
        (["MODEL.WEIGHTS", "missing.pth"], ["missing.pth", "not a file"]),
        (["DATASETS.TRAIN", "('coco_2017_trian',)"], ["coco_2017_trian", "coco_2017_train"]),
        (["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"], ["DATASETS.TRAIN"]),
        (["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN is empty", "--eval-only"]),
        (["--num-gpus", "0"], ["--num-gpus"]),
        (["--num-machines", "2"], ["--dist-url"]),
        (["--machine-rank", "1"], ["--machine-rank 1"]),
        (["SOLVER.GRAD_ACCUM_STEPS", "3"], ["SOLVER.IMS_PER_BATCH 2", "SOLVER.GRAD_ACCUM_STEPS 3"]),
        (["--num-gpus", "4"], ["SOLVER.IMS_PER_BATCH 2", "choose a multiple of 4"]),
        (["--resum"], ["--resum"]),
        (["--eval-only"], ["MODEL.WEIGHTS", "--resume"]),
        (["MODEL.DEVICE", "gpu"], ["MODEL.DEVICE", "cuda or cpu"]),
        (["--num-gpus", "2", "MODEL.DEVICE", "cuda:1"], ["'cuda:1'", "set it to cuda"]),
        (["OUTPUT_DIR", "/dev/null/run"], ["OUTPUT_DIR /dev/null/run", "choose another"]),
        (["OUTPUT_DIR", "file"], ["OUTPUT_DIR file", "choose another"]),
        (["TEST.BEST_METRIC", "segm/AP"], ["'segm/AP'", "bbox/AP, bbox/AP50"]),
    ],
)
def test_wrong_options(here, capsys, options, said):
    (here / "file").write_text("")
    elsewhere = {"missing.pth", "('coco_2017_trian',)", "OUTPUT_DIR"} & set(options)
    status = 1 if elsewhere else 2
    line = _error(capsys, "--config-file", LEAF, *SMALL, *options, status=status)
    for part in said:
        assert part in line


def test_no_config_file(here, capsys):
    assert "--config-file" in _error(capsys, status=2)
    assert "nothing.yaml" in _error(capsys, "--config-file", "nothing.yaml", status=2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("MODEL: {CONTNET: {VARIENT: x}}", "MODEL.CONTNET.VARIANT"),
        ("MODEL: !!python/object/apply:os.getcwd []", "bad.yaml"),
        ("MODEL: [", "bad.yaml"),
        ("_BASE_: gone.yaml", "gone.yaml"),
    ],
)
def test_wrong_yaml(here, capsys, content, said):
    (here / "bad.yaml").write_text(content)
    assert said in _error(capsys, "--config-file", "bad.yaml", status=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_no_gpu(here, capsys):
    line = _error(capsys, "--config-file", LEAF)
    assert "MODEL.DEVICE cpu" in line


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_gpus_than_there_are(here, capsys):
    line = _error(capsys, "--config-file", LEAF, "--num-gpus", "99")
    assert "99" in line
    assert str(torch.cuda.device_count()) in line


@pytest.mark.parametrize("gone", ["annotations/instances_val2017.json", "val2017"])
def test_missing_data(broken_root, capsys, gone):
    path = broken_root / "coco" / gone
    path.rename(path.with_name("elsewhere"))
    line = _error(capsys, "--config-file", LEAF, *SMALL)
    assert "DETECTRON2_DATASETS" in line
    assert str(path) in line


def test_output_with_checkpoints_is_not_overwritten(here, capsys):
    (here / "run").mkdir()
    (here / "run" / "last_checkpoint").write_text("model_0000001.pth")
    line = _error(capsys, "--config-file", LEAF, *SMALL, "OUTPUT_DIR", "run")
    assert "--resume" in line


def test_partial_torchrun_environment(here, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "WORLD_SIZE" in _error(capsys, "--config-file", LEAF, *SMALL)


def test_options_and_overrides_in_any_order():
    from contnet.launch.arguments import parse_arguments

    args = parse_arguments(
        ["SEED", "-1", "--resume", "OUTPUT_DIR", "x", "--config-file", "c.yaml", "A.B", "(1,)"]
    )
    assert args.resume
    assert args.config_file == "c.yaml"
    assert args.opts == ["SEED", "-1", "OUTPUT_DIR", "x", "A.B", "(1,)"]


def _train_file(root):
    return root / "coco" / "annotations" / "instances_train2017.json"


def _drop_image(root):
    next((root / "coco" / "val2017").iterdir()).unlink()


def _cut_json(root):
    file = _train_file(root)
    file.write_text(file.read_text()[:-100])


def _drop_key(key):
    def drop(root):
        content = json.loads(_train_file(root).read_text())
        del content[key]
        _train_file(root).write_text(json.dumps(content))

    return drop


DAMAGES = {
    "image": (_drop_image, [], "missing images"),
    "cut JSON": (_cut_json, [], "is not valid JSON"),
    "no images": (_drop_key("images"), [], "is not in COCO format"),
    "no categories": (_drop_key("categories"), [], "is not in COCO format"),
    "classes": (lambda root: None, ["MODEL.ROI_HEADS.NUM_CLASSES", "3"], "has 80 classes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_found_before_training_starts(broken_root, capsys, damage):
    apply, options, said = DAMAGES[damage]
    apply(broken_root)
    assert said in _error(capsys, "--config-file", LEAF, *SMALL, "OUTPUT_DIR", "run", *options)


def _only_error(process: subprocess.Popen) -> str:
    """Returns the only error line of a run."""
    output, _ = process.communicate(timeout=600)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1
    assert len(errors) == 1, output[-3000:]
    assert "Traceback" not in output
    return errors[0]


@pytest.mark.slow
def test_a_diverging_run_ends_in_one_line(train_net, tmp_path):
    options = ["SOLVER.BASE_LR", "1e30", "OUTPUT_DIR", str(tmp_path / "run")]
    line = _only_error(train_net(f"--config-file {LEAF}", *options))
    assert "not finite at iteration 1" in line


@pytest.mark.slow
@pytest.mark.parametrize(("split", "workers"), [("train", "1"), ("val", "0")])
def test_damaged_images_end_a_run_in_one_line(broken_root, train_net, tmp_path, split, workers):
    for file in (broken_root / "coco" / f"{split}2017").iterdir():
        file.write_bytes(file.read_bytes()[:900])
    options = ["SOLVER.MAX_ITER", "1", "DATALOADER.NUM_WORKERS", workers]
    options += ["DATASETS.CHECK_IMAGES", "none"]  # the check would find them before the run
    options += ["OUTPUT_DIR", str(tmp_path / "run")]
    root = str(broken_root)
    line = _only_error(train_net(f"--config-file {LEAF}", *options, DETECTRON2_DATASETS=root))
    assert f"{broken_root}/coco/{split}2017/" in line
    assert "image file is truncated" in line
