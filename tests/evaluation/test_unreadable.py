"""Tests unreadable images, which are reported, or skipped and counted as missed."""

import json
import math
from pathlib import Path

import pytest
from conftest import QUICK, REPOSITORY
from predicted_scenes import images_of, predict_instances
from test_cityscapes import exact_classes
from test_coco import assert_equal, official
from test_evaluate import SETS, Guesses

from contnet.config import load_config
from contnet.data.datasets.register import register_datasets
from contnet.evaluation.build import build_evaluator
from contnet.evaluation.evaluate import Evaluator
from contnet.utils.errors import UserError

pytest_plugins = ["predicted_scenes"]

IMAGES = {
    "boxes and masks": "shapes/val/*.jpg",
    "scenes of objects": "cityscapes/leftImg8bit/val/*/*.png",
    "scenes of classes": "cityscapes/leftImg8bit/val/*/*.png",
    "labels of images": "imagenet/val/*/*.JPEG",
}


@pytest.fixture
def evaluated(own_root):
    """Evaluates guesses on a kind of data set; returns the metrics and the record."""

    def evaluate(kind: str, *more: str) -> tuple[dict, dict]:
        if not (own_root / "run").exists():
            evaluate.options = SETS[kind](own_root)
            (own_root / "run").mkdir()
        config, *options = evaluate.options
        own = ["DATASETS.CACHE_DIR", str(own_root / "cache"), "OUTPUT_DIR", str(own_root / "run")]
        leaf = str(REPOSITORY / "configs" / f"{config}.yaml")
        cfg = load_config(leaf, [*QUICK, *own, *options, *more])
        register_datasets(cfg)
        metrics = Evaluator(cfg, warnings=["of the run"]).evaluate(Guesses())
        return metrics, json.loads((own_root / "run" / "results.json").read_text())[-1]

    return evaluate


def damage(own_root: Path, kind: str) -> Path:
    """Truncates the second image of a kind of data set."""
    image = sorted(own_root.glob(IMAGES[kind]))[1]
    image.write_bytes(image.read_bytes()[:200])
    return image


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("kind", SETS)
def test_a_damaged_image_is_named_or_skipped(evaluated, own_root, kind, workers):
    more = ("DATALOADER.NUM_WORKERS", workers)
    whole, record = evaluated(kind, *more, "TEST.SKIP_UNREADABLE", "True")
    assert record["skipped_images"] == 0 and record["warnings"] == ["of the run"]
    image = damage(own_root, kind)
    with pytest.raises(UserError, match=image.name):
        evaluated(kind, *more)
    metrics, record = evaluated(kind, *more, "TEST.SKIP_UNREADABLE", "True")
    assert record["skipped_images"] == 1
    assert record["warnings"][0] == "of the run"
    (warning,) = record["warnings"][1:]
    assert warning.count(image.name) == 1 and "1 of " in warning
    for task, values in metrics.items():
        main = next(iter(values))
        assert values.keys() == whole[task].keys()
        assert not math.isnan(values[main])


def test_objects_of_a_skipped_image_are_missed(evaluated, own_root):
    """The result is pycocotools' for a file without detections in the image."""
    kind = "boxes and masks"
    evaluated(kind)
    truth = json.loads((own_root / "shapes/annotations/instances_val.json").read_text())
    image = damage(own_root, kind)
    metrics, _ = evaluated(kind, "TEST.SKIP_UNREADABLE", "True")
    (file,) = (own_root / "run" / "inference").glob("*/coco_instances_results.json")
    found = json.loads(file.read_text())
    lost = {each["id"] for each in truth["images"] if each["file_name"] == image.name}
    assert len(lost) == 1 and not lost & {row["image_id"] for row in found}
    assert {row["image_id"] for row in found} == {i["id"] for i in truth["images"]} - lost
    for task in ("bbox", "segm"):
        assert_equal(metrics[task], official(truth, found, task, 100))


def test_the_label_of_a_skipped_image_is_missed(evaluated, own_root):
    kind = "labels of images"
    whole, _ = evaluated(kind)
    images = sorted(own_root.glob(IMAGES[kind]))
    hits = whole["classification"]["top1"] * len(images) / 100
    damage(own_root, kind)
    metrics, _ = evaluated(kind, "TEST.SKIP_UNREADABLE", "True")
    right = metrics["classification"]["top1"] * len(images) / 100
    assert right == pytest.approx(round(right)) and hits - 1 <= right <= hits + 1e-9


@pytest.mark.parametrize("kind", ["instance_seg", "sem_seg"])
def test_scenes_that_are_skipped_are_missed(cityscapes_root, tmp_path, kind):
    """The result is that of a scene without detections or classes."""
    images = images_of(cityscapes_root)
    records = [{"file_name": image, "image_id": Path(image).name} for image in images]
    config = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
    cfg = load_config(config, ["OUTPUT_DIR", str(tmp_path), "MODEL.MASK_ON", "True"])
    evaluator = build_evaluator(cfg, f"cityscapes_fine_{kind}_train")
    outputs = [scene_output(image) for image in images]
    evaluator.reset()
    evaluator.process(records[1:], outputs[1:])
    evaluator.skip(records[:1])
    skipped = evaluator.evaluate()
    assert evaluator.warnings == []
    evaluator.reset()
    evaluator.process(records[1:], outputs[1:])
    without = evaluator.evaluate()
    assert "3 images" in evaluator.warnings[0]
    evaluator.reset()
    evaluator.process(records, outputs)
    whole = evaluator.evaluate()
    task, name = ("cityscapes", "AP") if kind == "instance_seg" else ("sem_seg", "IoU")
    assert 0 < skipped[task][name] < without[task][name]
    assert skipped[task][name] < whole[task][name]


def scene_output(image: str) -> dict:
    """Predicts all objects and classes."""
    return {"instances": predict_instances(image, exact=True), "sem_seg": exact_classes(image)}


def test_all_images_may_be_unreadable(evaluated, own_root):
    evaluated("labels of images")
    images = list(own_root.glob(IMAGES["labels of images"]))
    for image in images:
        image.write_bytes(b"")
    metrics, record = evaluated("labels of images", "TEST.SKIP_UNREADABLE", "True")
    assert metrics == {"classification": {"top1": 0.0, "top5": 0.0}}
    assert record["skipped_images"] == len(images)
