"""Tests COCO's metrics on Cityscapes, and the annotations, which follow the data."""

import json
from pathlib import Path

import pytest
from cityscapes import write_polygons
from conftest import REPOSITORY
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from predicted_scenes import INSTANCES, images_of, predict_instances, run_evaluator, truth_file

from contnet.config import load_config
from contnet.evaluation.build import build_evaluator
from contnet.evaluation.cityscapes_coco import NumberedImages, as_coco
from contnet.evaluation.coco import ArrayCOCOEvaluator
from contnet.utils.errors import UserError

pytest_plugins = ["predicted_scenes"]
pytestmark = pytest.mark.numpy1


def test_instances_also_get_cocos_metrics(cityscapes_root, tmp_path):
    config = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
    cfg = load_config(config, ["OUTPUT_DIR", str(tmp_path), "MODEL.MASK_ON", "True"])
    images = images_of(cityscapes_root)
    outputs = [{"instances": predict_instances(image, exact=True)} for image in images]
    results = run_evaluator(build_evaluator(cfg, INSTANCES), images, outputs)
    assert list(results) == ["cityscapes", "bbox", "segm"]
    for task in ("bbox", "segm"):
        assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-car"} <= results[task].keys()
    # Detectron2's polygons are accurate to about a pixel.
    assert results["segm"]["AP50"] > 90
    cfg.MODEL.MASK_ON = False
    assert list(run_evaluator(build_evaluator(cfg, INSTANCES), images, outputs)) == ["bbox"]


def test_cocos_metrics_are_pycocotools(cityscapes_root, tmp_path):
    images = images_of(cityscapes_root)
    outputs = [{"instances": predict_instances(image)} for image in images]
    results = []
    for evaluator_class in (COCOEvaluator, ArrayCOCOEvaluator):
        name = as_coco(INSTANCES, str(tmp_path))
        coco = evaluator_class(name, output_dir=str(tmp_path), use_fast_impl=False)
        results.append(run_evaluator(NumberedImages(coco, INSTANCES), images, outputs))
    slow, fast = results
    for task, scores in slow.items():
        ours = {name: fast[task][name] for name in scores}  # ours also include recalls
        assert ours == pytest.approx(scores, abs=1e-12, rel=0, nan_ok=True)
    assert 0 < slow["bbox"]["AP"] < 100 and 0 < slow["segm"]["APs"] < 100


def annotations(folder: Path) -> list[Path]:
    return sorted(folder.glob("annotations-*.json"))


def test_cocos_annotations_follow_the_data(own_root, tmp_path):
    folder = tmp_path / "inference"
    name = as_coco(INSTANCES, str(folder))
    (first,) = annotations(folder)
    assert MetadataCatalog.get(name).json_file == str(first)
    assert "json_file" not in MetadataCatalog.get(INSTANCES).as_dict()
    written = first.stat().st_mtime_ns
    assert as_coco(INSTANCES, str(folder)) == name
    assert first.stat().st_mtime_ns == written
    count = len(json.loads(first.read_text())["annotations"])
    polygons = Path(truth_file(images_of(own_root)[0], "polygons")).with_suffix(".json")
    write_polygons(polygons, [])
    lost = as_coco(INSTANCES, str(folder))
    (second,) = annotations(folder)
    assert lost != name and second != first
    assert len(json.loads(second.read_text())["annotations"]) < count
    picture = Path(images_of(own_root)[1])
    picture.unlink()
    as_coco(INSTANCES, str(folder))
    (third,) = annotations(folder)
    names = {Path(image["file_name"]) for image in json.loads(third.read_text())["images"]}
    assert names == set(map(Path, images_of(own_root)))


def test_other_kinds_have_no_evaluator(cityscapes_root):
    cfg = load_config(str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml"))
    assert "voc_2007_val" in DatasetCatalog.list()
    with pytest.raises(UserError, match="has no evaluator"):
        build_evaluator(cfg, "voc_2007_val")
