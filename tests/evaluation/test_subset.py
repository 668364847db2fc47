"""Tests evaluation on data sets with a subset of the model's classes, matched by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SMALL
from detectron2.config import get_cfg
from detectron2.structures import Boxes, Instances
from PIL import Image

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.metadata import describe_model
from contnet.data.findings import ERROR, Findings
from contnet.data.validation.classes import check_classes
from contnet.evaluation.subset import share_classes
from contnet.launch.arguments import configure
from contnet.launch.main import main
from contnet.modeling.build import build_model
from contnet.utils.errors import UserError


class Kept:
    """Stores the outputs that an evaluator gets."""

    def process(self, inputs, outputs):
        self.outputs = outputs


OURS = ["cat", "person", "dog", "tree"]


def shared(theirs, output):
    evaluator = Kept()
    share_classes(evaluator, "mine", OURS, theirs).process([{}], [output])
    return evaluator.outputs[0]


def test_detections_of_other_classes_are_left_out():
    found = Instances((4, 4))
    found.pred_classes = torch.tensor([2, 0, 1, 3, 2])
    found.scores = torch.arange(5.0)
    found.pred_boxes = Boxes(torch.arange(20.0).view(5, 4))
    kept = shared(["dog", "cat"], {"instances": found})["instances"]
    assert kept.pred_classes.tolist() == [0, 1, 0]
    assert kept.scores.tolist() == [0, 1, 4]
    assert torch.equal(kept.pred_boxes.tensor, found.pred_boxes.tensor[[0, 1, 4]])
    assert found.pred_classes.tolist() == [2, 0, 1, 3, 2]


@pytest.mark.parametrize("kind", ["logits", "sem_seg"])
def test_scores_of_other_classes_are_left_out(kind):
    scores = torch.randn(4, *([2, 3] if kind == "sem_seg" else []))
    assert torch.equal(shared(["dog", "cat"], {kind: scores})[kind], scores[[2, 0]])


def test_unknown_classes_are_named():
    with pytest.raises(UserError, match=r"mine has 1 of its 2 classes .* \(bird\)"):
        share_classes(Kept(), "mine", OURS, ["cat", "bird"])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(["cat", "dog", "cat"], ["cat", "dog"]), (["cat", "dog"], ["cat", "dog", "cat"])],
    ids=["the model's", "the data's"],
)
def test_equal_names_match_no_classes(ours, theirs):
    """Predictions of one of them would count for the other one or not at all."""
    with pytest.raises(UserError, match="several are called cat"):
        share_classes(Kept(), "mine", ours, theirs)
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.NUM_CLASSES = "RetinaNet", len(ours)
    findings = Findings()
    findings.classes["objects"] = theirs
    check_classes(cfg, {"mine": findings}, trained=ours)
    assert "some of them more than once" in findings.lines(ERROR)[0]


# --- a run ---------------------------------------------------------------------------------------


def make_set(folder: Path, names: list[str]) -> list[str]:
    """Makes a data set in COCO format with a box of each class in each of two images."""
    folder.mkdir()
    images, boxes = [], []
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 80, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": 80, "height": 64})
        for number, _ in enumerate(names):
            box = [5 + 9 * number, 6, 30, 30]
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": i + 1,
                    "category_id": number + 1,
                    "bbox": box,
                    "area": 900,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "a.json").write_text(json.dumps(content))
    return [folder.name, str(folder / "a.json"), str(folder)]


def options(folder, names):
    entry = make_set(folder, names)
    leaf = str(REPOSITORY / "configs" / "retinanet_contti.yaml")
    opts = [*SMALL, "DATASETS.REGISTER", str([entry]), "DATASETS.TEST", str((entry[0],))]
    # Keep all detections.
    opts += ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "400"]
    return leaf, opts


def evaluate(leaf, opts, weights, output):
    status = main(
        [
            "--config-file",
            leaf,
            "--eval-only",
            *opts,
            "MODEL.WEIGHTS",
            weights,
            "OUTPUT_DIR",
            output,
        ]
    )
    return status


@pytest.fixture
def weights(tmp_path):
    """Saves a RetinaNet with three classes."""
    leaf, opts = options(tmp_path / "train", ["cat", "person", "dog"])
    cfg, _ = configure(leaf, [*opts, "DATASETS.TRAIN", "('train',)"])
    model = build_model(cfg)
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.1)
    metadata = describe_model(cfg, ["cat", "person", "dog"])
    Checkpointer(model, str(tmp_path), metadata=metadata).save("model_final")
    return str(tmp_path / "model_final.pth")


def test_a_model_is_evaluated_on_some_of_its_classes(tmp_path, weights, capsys):
    results = {}
    for number, names in enumerate([["dog", "cat"], ["cat", "person", "dog"], ["dog", "bird"]]):
        leaf, opts = options(tmp_path / f"set{number}", names)
        output = tmp_path / f"out{number}"
        status = evaluate(leaf, opts, weights, str(output))
        if "bird" in names:
            assert status == 1
            assert "bird" in capsys.readouterr().err
            continue
        assert status == 0
        file = output / "inference" / f"set{number}" / "coco_instances_results.json"
        results[number] = json.loads(file.read_text())

    # The same images; the same boxes and scores for dogs and cats, and none for persons.
    def of(number, category):
        return sorted(
            (each["image_id"], each["score"], each["bbox"])
            for each in results[number]
            if each["category_id"] == category
        )

    assert {each["category_id"] for each in results[0]} == {1, 2}
    assert of(0, 1) == of(1, 3)
    assert of(0, 2) == of(1, 1)
    assert "2 of the 3 classes" in (tmp_path / "out0" / "log.txt").read_text()


@pytest.mark.parametrize("label", ["cat", "cow"])
def test_the_best_metric_may_be_of_a_class_of_own_data(tmp_path, capsys, label):
    leaf, opts = options(tmp_path / "mine", ["cat", "dog"])
    opts += ["DATASETS.TRAIN", "('mine',)", "TEST.BEST_METRIC", f"bbox/AP-{label}"]
    opts += ["OUTPUT_DIR", str(tmp_path / "out"), "DATASETS.CACHE_DIR", str(tmp_path / "cache")]
    status = main(["--config-file", leaf, *opts, "SOLVER.MAX_ITER", "1"])
    if label == "cat":
        assert status == 0 and (tmp_path / "out" / "model_best.pth").exists()
    else:  # found before training
        assert status == 2 and "bbox/AP-dog" in capsys.readouterr().err.splitlines()[-1]
        assert not list((tmp_path / "out").glob("*.pth"))
