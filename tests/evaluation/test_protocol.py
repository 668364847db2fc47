"""Tests the records in results.json of how metrics were measured."""

import copy
import json
import random
import shutil

import pytest
from conftest import SMALL
from leaves import CONFIGS, SYSTEMS, TINY

from contnet.config import load_config
from contnet.data.datasets.register import register_datasets
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.evaluation.evaluate import Evaluator
from contnet.evaluation.protocol import dataset_digest
from contnet.modeling.build import build_model


@pytest.fixture(autouse=True)
def data_here(coco_here, cityscapes_root, imagenet_here):
    """Provides tiny versions of all data sets."""


def record_of(name, folder, *options):
    """Returns the record of an evaluation of random weights."""
    small = [*SMALL, *TINY] if not name.startswith("imagenet") else []
    words = [*small, *SYSTEMS[name][0].split(), *options, "MODEL.DEVICE", "cpu"]
    words += ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(folder)]
    folder.mkdir(exist_ok=True)
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), words)
    register_datasets(cfg)
    Evaluator(cfg).evaluate(build_model(cfg).eval())
    return json.loads((folder / "results.json").read_text())[-1]


CLASSES = ("MODEL.CLASSIFIER.NUM_CLASSES", "7")


@pytest.mark.parametrize("name", ["retinanet_contti", "fcos_contti", "faster_rcnn_contti"])
def test_the_shipped_detectors_are_standard(name, tmp_path):
    record = record_of(name, tmp_path)
    assert record["standard"] and not record["deviations"]
    protocol = record["protocol"]
    assert protocol["detections_per_image"] == 100 and protocol["precision"] == "float32"
    assert 0 < protocol["score_threshold"] < protocol["nms_threshold"] < 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("TEST.DETECTIONS_PER_IMAGE", "300"), "300 detections"),
        (("MODEL.RETINANET.SCORE_THRESH_TEST", "0.3"), "0.3"),
        (("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"), "bfloat16"),
    ],
)
def test_a_deviation_is_named(options, reason, tmp_path):
    record = record_of("retinanet_contti", tmp_path, *options)
    (line,) = record["deviations"]
    assert reason in line and not record["standard"]


def test_a_skipped_image_is_one(tmp_path, coco_here):
    root = coco_here / "datasets" / "coco"
    kept = root.resolve()
    root.unlink()
    shutil.copytree(kept, root)
    next((root / "val2017").iterdir()).write_bytes(b"")
    record = record_of("retinanet_contti", tmp_path / "run", "TEST.SKIP_UNREADABLE", "True")
    assert not record["standard"] and record["warnings"] and record["deviations"]


@pytest.mark.parametrize(
    ("name", "options"), [("imagenet/contti_strong", CLASSES), ("cityscapes/pspnet_contti", ())]
)
def test_others_have_no_limits(name, options, tmp_path):
    record = record_of(name, tmp_path, *options)
    assert record["standard"]
    assert set(record["protocol"]) == {"dataset_sha256", "precision"}


def test_the_digest_is_of_what_is_measured():
    cfg = load_config(str(CONFIGS / "faster_rcnn_contti.yaml"), [])
    records = [dict(each) for each in load_dataset_dicts(cfg, ["coco_2017_val"], train=False)]
    digest = dataset_digest(records)
    elsewhere = [{**each, "file_name": each["file_name"].replace("/", "/x/")} for each in records]
    assert dataset_digest(elsewhere) == digest
    turned = [dict(random.sample(sorted(each.items()), len(each))) for each in records]
    assert dataset_digest(turned) == digest
    changed = copy.deepcopy(records)
    changed[2]["annotations"][0]["bbox"][0] += 0.5
    assert len({digest, dataset_digest(changed), dataset_digest(records[::-1])}) == 3
