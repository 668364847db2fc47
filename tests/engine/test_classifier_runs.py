"""Tests whole runs of a classifier, evaluations only, and classes other than the trained ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from classifiers import MEAN, SMALL, STD, config
from conftest import REPOSITORY, finish
from PIL import Image
from torchvision.transforms import v2

from contnet.commands.convert_weights import main as convert_weights
from contnet.config import load_config
from contnet.data.datasets import imagenet
from contnet.data.datasets.register import register_datasets
from contnet.engine.trainer import Trainer
from contnet.launch.main import main
from contnet.modeling.build import build_model
from contnet.utils.errors import UserError

RUN_OPTIONS = """
INPUT.CLASSIFIER.SIZE 56 INPUT.CLASSIFIER.RESIZE_TEST 64 INPUT.CLASSIFIER.CROP_TEST 56
SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 3 SOLVER.WARMUP_ITERS 1 LOG_PERIOD 1 TEST.IMS_PER_PROCESS 3
"""
RUN = RUN_OPTIONS.split()
LEAF = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
SEVEN = [*SMALL, *RUN, "MODEL.CLASSIFIER.NUM_CLASSES", "7"]


@pytest.fixture
def command(train_net, imagenet_root, tmp_path):
    """Runs train_net.py on the seven classes with output in tmp_path; returns what it printed."""

    def run(options: str) -> str:
        words = [*SEVEN, "OUTPUT_DIR", str(tmp_path)]
        root = str(imagenet_root)
        return finish(
            train_net(f"--config-file {LEAF} {options}", *words, DETECTRON2_DATASETS=root)
        )

    return run


def plain_loop(cfg, folder: Path, weights: Path):
    """Computes top-1 and top-5 of a checkpoint, image by image, without our loader."""
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(weights)["model"])
    top, count = {1: 0, 5: 0}, 0
    for label, each in enumerate(sorted(folder.iterdir())):
        for file in sorted(each.iterdir()):
            image = Image.open(file).convert("RGB")
            width = int(64 * image.width / image.height)
            small = image.resize((width, 64), Image.Resampling.BILINEAR)
            pixels = v2.functional.center_crop(v2.functional.pil_to_tensor(small), [56, 56])
            with torch.no_grad():
                logits = model.network(((pixels - MEAN) / STD)[None])[0]
            order = logits.argsort(descending=True).tolist()
            for k in top:
                top[k] += label in order[:k]
            count += 1
    return {f"top{k}": 100 * number / count for k, number in top.items()}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_trains_evaluates_and_tells_the_accuracy(command, imagenet_root, tmp_path, processes):
    output = command(f"--num-gpus {processes}")
    (result,) = json.loads((tmp_path / "results.json").read_text())
    cfg = load_config(LEAF, SEVEN)
    val = imagenet_root / "imagenet" / "val"
    expected = plain_loop(cfg, val, tmp_path / "model_final.pth")
    assert result["metrics"]["classification"] == pytest.approx(expected)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[-1]["classification/top1"] == pytest.approx(expected["top1"])
    assert (tmp_path / "model_best.pth").exists()
    assert "| classification |" in output
    # The file for reports has each image once, from either process.
    (file,) = tmp_path.glob("inference/*/classification.json")
    found = json.loads(file.read_text())["images"]
    files = sorted(str(path) for path in val.glob("*/*"))
    assert sorted(each["file_name"] for each in found) == files
    hits = [each["label"] == each["classes"][0] for each in found]
    assert 100 * sum(hits) / len(hits) == pytest.approx(expected["top1"])


@pytest.mark.parametrize("batch", ["3", "6 SOLVER.GRAD_ACCUM_STEPS 2"])
def test_an_odd_batch_cannot_be_mixed(tmp_path, capsys, batch):
    opts = f"MODEL.CLASSIFIER.CUTMIX_ALPHA 1.0 OUTPUT_DIR {tmp_path} SOLVER.IMS_PER_BATCH {batch}"
    assert main(["--config-file", LEAF, *SMALL, *RUN, *opts.split()]) == 2
    error = capsys.readouterr().err
    assert "not 3" in error
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.fixture(scope="module")
def trained(imagenet_root, tmp_path_factory) -> Path:
    """Returns the folder of a short run on the seven classes, registered as a user's data."""
    folder = tmp_path_factory.mktemp("run")
    opts = ["SOLVER.CHECKPOINT_PERIOD", "3", "OUTPUT_DIR", str(folder)]
    options = ["--config-file", LEAF, *SMALL[:2], *RUN, *own_sets(imagenet_root / "imagenet")]
    assert main([*options, "DATALOADER.NUM_WORKERS", "0", "SEED", "1", *opts]) == 0
    return folder


def own_sets(home: Path) -> list[str]:
    """Registers both sets with names that contain their paths."""
    sets = [[f"{home}_{split}", str(home / split)] for split in ("train", "val")]
    train, val = (f"('{name}',)" for name, _ in sets)
    return ["DATASETS.REGISTER", str(sets), "DATASETS.TRAIN", train, "DATASETS.TEST", val]


def evaluate_alone(home: Path, weights: Path, output: Path, *opts: str) -> int:
    return main(
        [
            *("--config-file", LEAF, "--eval-only", *SMALL[:2], *RUN, *own_sets(home), *opts),
            *("DATALOADER.NUM_WORKERS", "0", "MODEL.WEIGHTS", str(weights)),
            *("OUTPUT_DIR", str(output)),
        ]
    )


@pytest.mark.slow
def test_evaluation_alone_as_a_command(command, trained, tmp_path):
    command(f"--eval-only MODEL.WEIGHTS {trained}/model_final.pth")
    (alone,) = json.loads((tmp_path / "results.json").read_text())
    (training,) = json.loads((trained / "results.json").read_text())
    assert alone["metrics"] == training["metrics"]
    assert alone["weights"] == f"{trained}/model_final.pth"


@pytest.mark.slow
def test_evaluation_alone_lists_its_set_once(imagenet_root, trained, tmp_path, monkeypatch):
    """The check before the run does not list the set again."""
    listed, read = [], imagenet.read_set
    monkeypatch.setattr(imagenet, "read_set", lambda *args: listed.append(args) or read(*args))
    home, weights = imagenet_root / "imagenet", trained / "model_final.pth"
    assert evaluate_alone(home, weights, tmp_path) == 0
    assert len(listed) == 1


def _reorder(val: Path) -> None:
    val.joinpath("n00000001").rename(val / "n00000009")


def _lose(val: Path) -> None:
    shutil.rmtree(val / "n00000003")


@pytest.mark.slow
@pytest.mark.parametrize("converted", [False, True])
def test_evaluation_alone_goes_by_the_names_of_classes(
    imagenet_root, trained, tmp_path, capsys, converted
):
    """Without the training set, the class numbers of a set are its own."""
    home, weights = tmp_path / "imagenet", trained / "model_final.pth"
    shutil.copytree(imagenet_root / "imagenet", home)
    if converted:
        assert convert_weights([str(weights), str(tmp_path / "a.safetensors")]) == 0
        weights = Path(capsys.readouterr().out.splitlines()[-1])
    _lose(home / "val")
    assert evaluate_alone(home, weights, tmp_path / "out") == 0
    assert "6 of the 7 classes of the weights" in (tmp_path / "out" / "log.txt").read_text()
    _reorder(home / "val")
    assert evaluate_alone(home, weights, tmp_path / "other") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "its classes" in error and "1 too many: n00000009" in error


@pytest.mark.slow
def test_a_resume_on_other_classes_is_refused(imagenet_root, trained, tmp_path):
    shutil.copytree(imagenet_root / "imagenet", tmp_path / "imagenet")
    for split in ("train", "val"):
        _reorder(tmp_path / "imagenet" / split)
    cfg = config(*RUN, *own_sets(tmp_path / "imagenet"), "MODEL.CLASSIFIER.NUM_CLASSES", "7")
    register_datasets(cfg)
    cfg.OUTPUT_DIR = str(trained)
    with pytest.raises(UserError, match=r"1 too many: n00000009; 1 missing: n00000001"):
        Trainer(cfg, 1).resume_or_load(str(trained / "model_final.pth"))
