"""Tests Cityscapes' test split, which has no ground truth, and the files for its server."""

import json
import shutil
from pathlib import Path

import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as official_instances
import numpy as np
import pytest
import torch
from cityscapes import write_polygons
from cityscapesscripts.helpers.labels import name2label
from conftest import QUICK, REPOSITORY
from detectron2.data import MetadataCatalog
from PIL import Image
from test_evaluate import Guesses

from contnet.config import load_config
from contnet.data.validation.dataset import check_datasets, has_truth
from contnet.evaluation.build import build_evaluator
from contnet.evaluation.evaluate import Evaluator
from contnet.utils.errors import UserError

pytest_plugins = ["predicted_scenes"]

LEAVES = {"instance_seg": "mask_rcnn_contti", "sem_seg": "pspnet_contti"}
FRAME = [{"label": "out of roi", "polygon": [[0, 0], [128, 0], [128, 9]]}]


@pytest.fixture(params=["no folder", "frames alone", "empty folder"])
def test_split(own_root, request) -> Path:
    """Copies val as the split that Cityscapes publishes without objects; returns its images."""
    images, truth = (own_root / "cityscapes" / kind for kind in ("leftImg8bit", "gtFine"))
    shutil.copytree(images / "val", images / "test")
    if request.param == "empty folder":
        (truth / "test").mkdir()
    if request.param == "frames alone":
        for image in (images / "test").glob("*/*.png"):
            stem = image.name.removesuffix("_leftImg8bit.png")
            file = truth / "test" / image.parent.name / f"{stem}_gtFine_polygons.json"
            write_polygons(file, FRAME)
    return images / "test"


def config(own_root: Path, task: str, *more: str):
    leaf = str(REPOSITORY / "configs" / "cityscapes" / f"{LEAVES[task]}.yaml")
    own = {
        "DATASETS.TEST": f"('cityscapes_fine_{task}_test',)",
        "DATASETS.CACHE_DIR": str(own_root / "cache"),
        "OUTPUT_DIR": str(own_root / "run"),
    }
    return load_config(leaf, [*QUICK, *(word for pair in own.items() for word in pair), *more])


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("task", LEAVES)
def test_files_for_the_server(own_root, test_split, task, cache):
    more = () if cache else ("DATASETS.CACHE_DIR", "")
    cfg = config(own_root, task, *more)
    name = f"cityscapes_fine_{task}_test"
    check_datasets(cfg, [name])  # no error is raised
    assert not has_truth(cfg, name) and has_truth(cfg, name.replace("test", "val"))
    stale = own_root / "run" / "inference" / name / "server" / "stale.png"
    stale.parent.mkdir(parents=True)
    stale.touch()
    assert Evaluator(cfg).evaluate(Guesses()) == {}
    (record,) = json.loads((own_root / "run" / "results.json").read_text())
    assert record["metrics"] == {} and str(stale.parent) in record["warnings"][0]
    assert not stale.exists()
    images = sorted(test_split.glob("*/*.png"))
    assert len(images) == 2
    check = check_classes if task == "sem_seg" else check_instances
    for image in images:
        record = {"file_name": str(image), "height": 64, "width": 128}
        check(stale.parent, image, Guesses()([record])[0])
    assert len(list(stale.parent.iterdir())) == (2 if task == "sem_seg" else 3)


def check_classes(folder: Path, image: Path, output: dict) -> None:
    """Checks for class ids, not train ids, in a file with the image's name."""
    found = np.asarray(Image.open(folder / image.name))
    assert found.dtype == np.uint8 and found.shape == (64, 128)
    evaluated = [label for label in name2label.values() if not label.ignoreInEval]
    trained = {label.id: label.trainId for label in evaluated}
    trained = np.vectorize(trained.get)(found)
    assert (trained == output["sem_seg"].argmax(dim=0).numpy()).all()


def check_instances(folder: Path, image: Path, output: dict) -> None:
    """Checks what the official script reads."""
    file = folder / f"{image.stem}_pred.txt"
    args = official_instances.args
    args.predictionPath, args.predictionWalk = str(folder), None
    read = official_instances.readPredInfo(str(file), args)
    instances = output["instances"]
    things = MetadataCatalog.get("cityscapes_fine_instance_seg_test").thing_classes
    assert len(read) == len(instances)
    for number, (path, row) in enumerate(read.items()):
        assert row["conf"] == pytest.approx(instances.scores[number].item())
        assert row["labelID"] == name2label[things[instances.pred_classes[number]]].id
        mask = torch.from_numpy(np.asarray(Image.open(path)) > 0)
        assert torch.equal(mask, instances.pred_masks[number])


def test_boxes_alone_have_no_form(own_root, test_split):
    cfg = config(own_root, "instance_seg", "MODEL.MASK_ON", "False")
    with pytest.raises(UserError, match="accepts no boxes"):
        build_evaluator(cfg, "cityscapes_fine_instance_seg_test")


def test_labels_that_are_missing_elsewhere_are_an_error(own_root):
    shutil.rmtree(own_root / "cityscapes" / "gtFine" / "val")
    cfg = config(own_root, "sem_seg")
    with pytest.raises(UserError, match="gtFine/val does not exist"):
        check_datasets(cfg, ["cityscapes_fine_sem_seg_val"])


def test_a_test_split_cannot_be_trained_on(own_root, test_split):
    name = "cityscapes_fine_sem_seg_test"
    cfg = config(own_root, "sem_seg", "DATASETS.TRAIN", f"('{name}',)")
    with pytest.raises(UserError, match="nothing can be learned"):
        check_datasets(cfg, [name])
