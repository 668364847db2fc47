"""Tests that each config for a CPU trains and evaluates unchanged on a user's own data."""

import json
from pathlib import Path

import pytest
from conftest import REPOSITORY
from detectron2.layers import FrozenBatchNorm2d
from imagenet import make_imagenet
from leaves import LEAVES

from contnet.data.datasets.shapes import make_shapes
from contnet.launch.main import main
from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.build import build_model

QUICK = [name for name in LEAVES if name.startswith("quick/")]
FEW = ["SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "1", "TEST.EVAL_PERIOD", "0"]
FEW += ["SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0", "SEED", "1"]
# The smallest size for which the feature maps are not empty.
SMALL = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
METRICS = {"classifier": "classification", "cityscapes_pspnet": "sem_seg"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quick")
    make_shapes(folder / "mine", num_train=4, num_val=2)
    make_imagenet(folder / "pictures", classes=3, train=2, val=1)
    return folder


def own_sets(name: str, folder: Path) -> list[str]:
    """Returns the options for a user's own data; Cityscapes has built-in names."""
    if "cityscapes" in name:
        return []
    if name.endswith("classifier"):
        root = folder / "pictures" / "imagenet"
        sets = [[f"mine_{split}", str(root / split)] for split in ("train", "val")]
    else:
        root = folder / "mine"
        sets = [
            [f"mine_{split}", str(root / f"annotations/instances_{split}.json"), str(root / split)]
            for split in ("train", "val")
        ]
    return ["DATASETS.REGISTER", str(sets)]


def test_there_is_one_for_each_system():
    systems = {"faster_rcnn", "mask_rcnn", "retinanet", "fcos", "classifier"}
    systems |= {"cityscapes_mask_rcnn", "cityscapes_pspnet"}
    assert {name.partition("/")[2] for name in QUICK} == systems


@pytest.mark.parametrize("name", QUICK)
def test_every_part_is_trained(name):
    """Random weights need trained norms and no frozen layers."""
    cfg = load_checked_config(str(REPOSITORY / "configs" / f"{name}.yaml"))
    assert cfg.MODEL.DEVICE == "cpu"
    model = build_model(cfg)
    assert not [each for each in model.modules() if isinstance(each, FrozenBatchNorm2d)]
    assert [key for key, value in model.named_parameters() if not value.requires_grad] == []
    resnet = ["MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME.replace("contnet", "resnet")]
    if name in ("quick/faster_rcnn", "quick/retinanet", "quick/fcos"):
        cfg = load_checked_config(str(REPOSITORY / "configs" / f"{name}.yaml"), resnet)
        model = build_model(cfg)
        assert not [each for each in model.modules() if isinstance(each, FrozenBatchNorm2d)]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_it_trains_and_evaluates(name, drawn, cityscapes_root, tmp_path):
    file = str(REPOSITORY / "configs" / f"{name}.yaml")
    sizes = [] if name.endswith(("classifier", "pspnet")) else SMALL
    options = [*FEW, *sizes, *own_sets(name, drawn), "OUTPUT_DIR", str(tmp_path)]
    assert main(["--config-file", file, *options]) == 0
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert METRICS.get(name.partition("/")[2], "bbox") in result["metrics"]
