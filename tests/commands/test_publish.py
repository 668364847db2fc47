"""Tests tools/publish.py: a complete folder without any paths of this machine."""

import json

import numpy as np
import pytest
import torch
from conftest import QUICK
from leaves import CONFIGS
from safetensors import safe_open
from untrained import NAMES, save_untrained

import contnet
from contnet.commands.publish import main
from contnet.launch.main import main as train

SYSTEMS = ["faster_rcnn_contti", "cityscapes/pspnet_contti", "imagenet/contti_strong"]


def image():
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def same(found, others):
    return all(np.array_equal(found[key], others[key]) for key in found)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_folder_predicts_the_same(name, tmp_path):
    save_untrained(tmp_path / "run", name)
    target = tmp_path / "published"
    assert main([str(tmp_path / "run"), str(target)]) == 0
    ours, theirs = (contnet.load_run(folder) for folder in (tmp_path / "run", target))
    assert same(ours(image()), theirs(image()))
    assert theirs.class_names == NAMES
    # The name contains the hash, which is verified.
    (file,) = target.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(contnet.utils.errors.UserError, match="SHA-256"):
        contnet.load_run(target)


@pytest.fixture(scope="module")
def run(imagenet_root, tmp_path_factory):
    """Trains a classifier with EMA for three iterations."""
    folder = tmp_path_factory.mktemp("home") / "joes_folder" / "run"
    leaf = ["--config-file", str(CONFIGS / "imagenet" / "contti.yaml")]
    options = """
    SOLVER.MAX_ITER 3 SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.5 TEST.EVAL_PERIOD 2
    MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32
    INPUT.CLASSIFIER.CROP_TEST 32 SOLVER.WARMUP_FACTOR 0.1
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
        assert train([*leaf, *QUICK, *options.split(), "OUTPUT_DIR", str(folder)]) == 0
    return folder


def test_what_is_in_it(run, tmp_path, capsys):
    target = tmp_path / "tiny"
    assert main([str(run), str(target)]) == 0
    names = sorted(path.name for path in target.iterdir())
    assert names[:3] == ["README.md", "config.yaml", "results.json"] and len(names) == 4
    (file,) = target.glob("tiny-*.safetensors")
    with safe_open(file, "pt") as tensors:
        kept = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    best = torch.load(run / "model_best.pth")
    ema = {name.removeprefix("module."): value for name, value in best["ema"].items()}
    assert kept.keys() == ema.keys()
    assert all(torch.equal(value, ema[name]) for name, value in kept.items())
    for path in target.iterdir():
        assert b"joes_folder" not in path.read_bytes(), path
    records = json.loads((target / "results.json").read_text())
    assert [each["iteration"] for each in records] == [best["trainer"]["iteration"]]
    card = (target / "README.md").read_text()
    top1 = records[0]["metrics"]["classification"]["top1"]
    assert f"{top1:.2f}" in card and "contnet_ti" in card


def test_weights_take_the_folder(run, imagenet_root, tmp_path, monkeypatch):
    """An evaluation of the folder has the same results as the training."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
    target, out = tmp_path / "tiny", tmp_path / "out"
    assert main([str(run), str(target)]) == 0
    evaluate = ["--config-file", str(target / "config.yaml"), "--eval-only"]
    options = ["SOLVER.EMA.ENABLED", "False", "MODEL.WEIGHTS", str(target), "OUTPUT_DIR", str(out)]
    assert train([*evaluate, *options]) == 0
    before, after = (
        json.loads((folder / "results.json").read_text())[-1]["metrics"] for folder in (target, out)
    )
    assert before == after


def test_mistakes(run, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    bare = tmp_path / "bare.pth"
    torch.save({"weight": torch.zeros(3)}, bare)
    for source, target in ((run, "there"), (tmp_path / "there", "new"), (bare, "new")):
        assert main([str(source), str(tmp_path / target)]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "new").exists()
