"""Tests COCO evaluation on arrays against pycocotools, on random detections and ground truth."""

import contextlib
import io
import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from contnet.config import load_config
from contnet.data.datasets.classes import distinct_class_names
from contnet.evaluation import coco_ap
from contnet.evaluation.build import build_evaluator
from contnet.evaluation.coco import ArrayCOCOEvaluator, build_coco_evaluator
from contnet.evaluation.coco_ap import ArrayEvaluation, Detections, encode_masks
from contnet.evaluation.results import markdown_tables
from contnet.utils.errors import UserError

HEIGHT, WIDTH = 120, 160
MAIN = ("AP", "AP50", "AP75", "APs", "APm", "APl")
LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")


def random_box(rng):
    """Returns an XYWH box, from small to large by COCO's areas."""
    width, height = np.exp(rng.uniform(np.log(6), np.log([WIDTH, HEIGHT])))
    return [rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height), width, height]


def polygon_of(box):
    """Returns a triangle in the box."""
    x, y, w, h = box
    return [[x, y, x + w, y, x + w / 2, y + h]]


def crowd_of(box):
    """Returns uncompressed run lengths, as for COCO's crowds."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    x, y, w, h = (int(v) for v in box)
    mask[y : y + h + 1, x : x + w + 1] = 1
    flat = mask.reshape(-1, order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts if flat[0] == 0 else [0, *counts]}


def random_truth(rng, images, classes, per_image=8):
    """Makes a COCO file: every third image is empty, some objects are crowds or have "ignore"."""
    categories = [{"id": 3 * i + 2, "name": f"class-{i}"} for i in range(classes)]
    annotations = []
    for image in range(images):
        for _ in range(0 if image % 3 == 2 else per_image):
            box, crowd = random_box(rng), rng.random() < 0.2
            segmentation = crowd_of(box) if crowd else polygon_of(box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 * image,
                    "category_id": int(rng.choice(categories)["id"]),
                    "bbox": box,
                    "area": box[2] * box[3] * (1 if crowd else 0.5),
                    "iscrowd": int(crowd),
                    "ignore": int(rng.random() < 0.2),
                    "segmentation": segmentation,
                }
            )
    shapes = [{"id": 10 * i, "height": HEIGHT, "width": WIDTH} for i in range(images)]
    return {"images": shapes, "annotations": annotations, "categories": categories}


def mask_of(segmentation):
    """Returns the mask of an annotation as an array."""
    if isinstance(segmentation, dict):
        return rle.decode(rle.frPyObjects(segmentation, HEIGHT, WIDTH))
    return rle.decode(rle.merge(rle.frPyObjects(segmentation, HEIGHT, WIDTH)))


def random_detections(rng, truth, image_id, masks, noise=12):
    """Detects objects near their boxes, twice or not at all, with right or wrong classes."""
    classes = len(truth["categories"])
    boxes, found = [], []
    for item in truth["annotations"]:
        for _ in range(rng.integers(0, 3) if item["image_id"] == image_id else 0):
            boxes.append(np.array(item["bbox"]) + rng.normal(size=4) * rng.choice([0, 1, 4]))
            found.append((item["category_id"] - 2) // 3 if rng.random() < 0.8 else None)
    boxes += [np.array(random_box(rng)) for _ in range(noise)]
    found += [None] * noise
    boxes = np.stack(boxes) if boxes else np.zeros((0, 4))
    boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:].clip(1)
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    # In steps of 0.1, so that many are equal within and between images.
    instances.scores = torch.tensor(rng.integers(0, 11, len(found)) / 10, dtype=torch.float32)
    classes = [rng.integers(classes) if each is None else each for each in found]
    instances.pred_classes = torch.tensor(np.array(classes, dtype=int))
    if masks:
        xywh = [[x, y, u - x, v - y] for x, y, u, v in boxes.tolist()]
        drawn = [mask_of(polygon_of(box)) for box in xywh]
        instances.pred_masks = torch.tensor(np.array(drawn).reshape(-1, HEIGHT, WIDTH)).bool()
    return instances


@pytest.fixture
def evaluated(tmp_path):
    """Evaluates detections by image id; returns our metrics and a function for pycocotools'."""
    names = []

    def evaluate(truth, detections, *options):
        name = f"random_{tmp_path.name}_{len(names)}"
        names.append(name)
        (tmp_path / f"{name}.json").write_text(json.dumps(truth))
        DatasetCatalog.register(name, list)
        ids = {each["id"]: i for i, each in enumerate(truth["categories"])}
        MetadataCatalog.get(name).set(
            evaluator_type="coco",
            json_file=str(tmp_path / f"{name}.json"),
            thing_dataset_id_to_contiguous_id=ids,
            thing_classes=[each["name"] for each in truth["categories"]],
        )
        cfg = load_config(LEAF, ["OUTPUT_DIR", str(tmp_path), *options])
        evaluator = build_evaluator(cfg, name)
        evaluator.reset()
        for image_id, instances in detections.items():
            evaluator.process([{"image_id": image_id}], [{"instances": instances}])
        results = evaluator.evaluate()
        found = json.loads(
            (tmp_path / "inference" / name / "coco_instances_results.json").read_text()
        )
        return results, lambda task, limit: official(truth, found, task, limit)

    yield evaluate
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def official(truth, results, task, limit):
    """Returns pycocotools' metrics, with our own means over its arrays."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = json.loads(json.dumps(truth))
        ground_truth.createIndex()
        if task == "segm":
            results = [{k: v for k, v in each.items() if k != "bbox"} for each in results]
        if results:
            detections = ground_truth.loadRes(results)
        else:
            detections = COCO()
            detections.dataset = {**ground_truth.dataset, "annotations": []}
            detections.createIndex()
        evaluation = COCOeval(ground_truth, detections, task)
        evaluation.params.maxDets = [1, 10, limit]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][..., -1]  # threshold, recall, class, area

    def mean(part):
        return 100 * part[part > -1].mean() if (part > -1).any() else math.nan

    parts = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0]]
    parts += [precision[..., i] for i in (1, 2, 3)]
    metrics = dict(zip(MAIN, map(mean, parts), strict=True))
    names = [each["name"] for each in truth["categories"]]
    for i, (name, each) in enumerate(zip(names, truth["categories"], strict=True)):
        number = f" (id {each['id']})" if names.count(name) > 1 else ""
        metrics[f"AP-{name}{number}"] = mean(precision[:, :, i, 0])
    recalls = [*(f"AR@{most}" for most in evaluation.params.maxDets), "ARs", "ARm", "ARl"]
    for name, value in zip(recalls, evaluation.stats[6:], strict=True):
        metrics[name] = 100 * value if value >= 0 else math.nan
    return metrics


def assert_equal(ours, theirs):
    """Checks that metrics are equal except for rounding; nan equals nan."""
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, abs=1e-12, rel=0, nan_ok=True)


@pytest.mark.parametrize(("images", "classes", "seed"), [(1, 2, 0), (12, 3, 1), (9, 80, 2)])
@pytest.mark.parametrize("masks", [False, True])
def test_equals_pycocotools(evaluated, images, classes, seed, masks):
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, images, classes)
    found = {10 * i: random_detections(rng, truth, 10 * i, masks) for i in range(images)}
    options = ["MODEL.MASK_ON", str(masks)]
    results, reference = evaluated(truth, found, *options)
    assert list(results) == (["bbox", "segm"] if masks else ["bbox"])
    for task, metrics in results.items():
        assert_equal(metrics, reference(task, 100))
        assert 0 < metrics["AP"] < 100
    if masks:
        assert results["segm"]["AP"] != results["bbox"]["AP"]


@pytest.mark.parametrize("limit", [1, 5, 100, 150])
def test_equals_pycocotools_with_any_limit_of_detections(evaluated, limit):
    """pycocotools sorts the limits 1, 10 and ours, so that it also treats fewer than 10 as 10."""
    rng = np.random.default_rng(limit)
    truth = random_truth(rng, 4, 2, per_image=60)
    found = {10 * i: random_detections(rng, truth, 10 * i, False, noise=300) for i in range(4)}
    results, reference = evaluated(truth, found, "TEST.DETECTIONS_PER_IMAGE", str(limit))
    assert_equal(results["bbox"], reference("bbox", limit))
    others = {other: reference("bbox", other)["AP"] for other in (10, 100, 150) if other != limit}
    assert limit < 10 or results["bbox"]["AP"] not in others.values()


def test_pycocotools_does_none_of_the_work(evaluated, monkeypatch):
    rng = np.random.default_rng(0)
    truth = random_truth(rng, 3, 2)
    found = {10 * i: random_detections(rng, truth, 10 * i, False) for i in range(3)}
    monkeypatch.delattr(COCOeval, "evaluateImg")
    for limit in ("100", "7"):
        results, _ = evaluated(truth, found, "TEST.DETECTIONS_PER_IMAGE", limit)
        assert results["bbox"]["AP"] > 0


@pytest.mark.parametrize("masks", [False, True])
def test_no_detection_at_all_is_zero(evaluated, masks):
    truth = random_truth(np.random.default_rng(3), 4, 3)
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] != 2]
    empty = Instances(
        (HEIGHT, WIDTH),
        pred_boxes=Boxes(torch.zeros(0, 4)),
        scores=torch.zeros(0),
        pred_classes=torch.zeros(0, dtype=torch.long),
    )
    found = {10 * i: empty for i in range(4)}
    results, reference = evaluated(truth, found, "MODEL.MASK_ON", str(masks))
    assert list(results) == (["bbox", "segm"] if masks else ["bbox"])
    for task, metrics in results.items():
        assert_equal(metrics, reference(task, 100))
        assert metrics["AP"] == 0
        assert math.isnan(metrics["AP-class-0"])


def test_detections_but_nothing_to_find_is_no_number(evaluated):
    rng = np.random.default_rng(4)
    truth = random_truth(rng, 3, 2)
    truth["annotations"] = [{**each, "iscrowd": 1} for each in truth["annotations"]]
    found = {10 * i: random_detections(rng, truth, 10 * i, False) for i in range(3)}
    results, reference = evaluated(truth, found)
    assert_equal(results["bbox"], reference("bbox", 100))
    assert all(map(math.isnan, results["bbox"].values()))


def test_each_class_of_an_equal_name_has_its_ap(evaluated):
    rng = np.random.default_rng(14)
    truth = random_truth(rng, 6, 4)
    names = ["cat", "dog", "cat", "bird"]
    for category, name in zip(truth["categories"], names, strict=True):
        category["name"] = name
    found = {10 * i: random_detections(rng, truth, 10 * i, False) for i in range(6)}
    results, reference = evaluated(truth, found)
    assert_equal(results["bbox"], reference("bbox", 100))
    rows = [key for key in results["bbox"] if key.startswith("AP-")]
    assert rows == ["AP-cat (id 2)", "AP-dog", "AP-cat (id 8)", "AP-bird"]
    _, recalls, by_class = markdown_tables("val", results).split("\n\n")
    assert by_class.count("| cat (id ") == 2 and "| AR@100 |" in recalls


def test_no_two_names_are_made_equal():
    names = ["cat", "cat", "cat (id 1)", "dog", "", ""]
    distinct = distinct_class_names(names, range(1, 7))
    assert len(set(distinct)) == 6 and distinct[3] == "dog"
    assert all(new.startswith(old) for new, old in zip(distinct, names, strict=True))


def test_annotation_id_0_counts_as_missed_as_in_pycocotools(evaluated):
    rng = np.random.default_rng(15)
    truth = random_truth(rng, 4, 2)
    found = {10 * i: random_detections(rng, truth, 10 * i, False) for i in range(4)}
    right, _ = evaluated(truth, found)
    for each in truth["annotations"]:
        each["id"] -= 1
    results, reference = evaluated(truth, found)
    assert_equal(results["bbox"], reference("bbox", 100))
    assert results["bbox"]["AP"] < right["bbox"]["AP"]


# --- without ground truth ------------------------------------------------------------------------


@pytest.mark.parametrize("annotations", [{}, {"annotations": []}], ids=["no list", "empty list"])
@pytest.mark.parametrize("masks", [False, True])
def test_without_truth_there_is_the_servers_file(tmp_path, annotations, masks):
    rng = np.random.default_rng(16)
    truth = random_truth(rng, 4, 3)
    file = tmp_path / "image_info_test-dev2017.json"
    file.write_text(json.dumps({**without_annotations(truth), **annotations}))
    name = f"test_{tmp_path.name}"
    ids = {each["id"]: i for i, each in enumerate(truth["categories"])}
    MetadataCatalog.get(name).set(
        json_file=str(file), thing_dataset_id_to_contiguous_id=ids, evaluator_type="coco"
    )
    cfg = load_config(LEAF, ["OUTPUT_DIR", str(tmp_path), "MODEL.MASK_ON", str(masks)])
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    found = {10 * i: random_detections(rng, truth, 10 * i, masks) for i in range(4)}
    for image_id, instances in found.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    assert evaluator.evaluate() == {}
    (written,) = (tmp_path / "inference" / name).iterdir()
    assert written.name == "detections_test-dev2017_contnet_results.json"
    assert str(written) in evaluator.warnings[0]
    rows = json.loads(written.read_text())
    assert len(rows) == sum(map(len, found.values()))
    keys = {"image_id", "category_id", "bbox", "score", *["segmentation"] * masks}
    assert all(row.keys() == keys for row in rows)
    assert {row["category_id"] for row in rows} <= ids.keys()
    # The server loads the file, which is also valid with the ground truth.
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        coco.loadRes(str(written))


def test_keypoints_without_truth_are_in_the_servers_file(tmp_path):
    truth = random_truth(np.random.default_rng(17), 2, 1)
    file = tmp_path / "image_info_test-dev2017.json"
    file.write_text(json.dumps(without_annotations(truth)))
    name = f"keypoints_{tmp_path.name}"
    MetadataCatalog.get(name).set(
        json_file=str(file), thing_dataset_id_to_contiguous_id={1: 0}, evaluator_type="coco"
    )
    options = ["OUTPUT_DIR", str(tmp_path), "MODEL.KEYPOINT_ON", "True"]
    evaluator = build_evaluator(load_config(LEAF, options), name)
    evaluator.reset()
    found = random_detections(np.random.default_rng(18), truth, 0, False)
    found.pred_keypoints = torch.ones(len(found), 17, 3)
    evaluator.process([{"image_id": 0}], [{"instances": found}])
    assert evaluator.evaluate() == {}
    written = tmp_path / "inference" / name / "detections_test-dev2017_contnet_results.json"
    assert str(written) in evaluator.warnings[0]
    rows = json.loads(written.read_text())
    assert len(rows) == len(found) > 0 and all(len(row["keypoints"]) == 51 for row in rows)


def without_annotations(truth):
    """Returns the published part of a test set."""
    return {key: value for key, value in truth.items() if key != "annotations"}


def both(truth, results, task, limit=100, images=None):
    """Returns our evaluation and pycocotools' of the same detections, accumulated."""
    coco = COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        coco.dataset = json.loads(json.dumps(truth))
        coco.createIndex()
        theirs = COCOeval(coco, coco.loadRes(json.loads(json.dumps(results))), task)
        masks = [each["segmentation"] for each in results] if task == "segm" else None
        found = Detections(
            np.array([each["image_id"] for each in results]),
            np.array([each["category_id"] for each in results]),
            np.array([each["score"] for each in results]),
            np.array([each.get("bbox", [0] * 4) for each in results]),
            masks,
            np.array([rle.area(mask) for mask in masks or ()], dtype=float),
        )
        ours = ArrayEvaluation(coco, found, task)
        for evaluation in (theirs, ours):
            evaluation.params.maxDets = [1, 10, limit]
            evaluation.params.imgIds = images or evaluation.params.imgIds
            evaluation.evaluate()
            evaluation.accumulate()
    return ours, theirs


def random_results(rng, truth, task, noise=12):
    results = []
    for image in truth["images"]:
        found = random_detections(rng, truth, image["id"], task == "segm", noise)
        for i in range(len(found)):
            x, y, u, v = found.pred_boxes.tensor[i].tolist()
            shape = {"bbox": [x, y, u - x, v - y]}
            if task == "segm":
                (mask,) = encode_masks(found.pred_masks[i : i + 1])
                shape = {"segmentation": mask}
            category = truth["categories"][int(found.pred_classes[i])]["id"]
            score = found.scores[i].item()
            results.append(
                {"image_id": image["id"], "category_id": category, "score": score, **shape}
            )
    return results


def assert_same_curves(ours, theirs):
    for name in ("precision", "recall"):
        assert ours.eval[name].shape == theirs.eval[name].shape
        assert np.abs(ours.eval[name] - theirs.eval[name]).max() <= 1e-12
    assert (theirs.eval["precision"] > 0).any()


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize(("images", "classes", "crowded"), [(20, 2, 20), (6, 30, 8), (2, 1, 90)])
def test_all_curves_equal_pycocotools(task, images, classes, crowded):
    rng = np.random.default_rng([images, classes])
    truth = random_truth(rng, images, classes, crowded)
    ours, theirs = both(truth, random_results(rng, truth, task), task)
    assert_same_curves(ours, theirs)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs.summarize()
        ours.summarize()
    assert ours.stats == pytest.approx(theirs.stats, abs=1e-12, rel=0)


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize(("second", "right"), [(0, True), (8, False)])
def test_of_equal_overlaps_the_later_object_is_taken(task, second, right):
    """The box is between two objects; the next detection shows which object is still free."""

    def shape(x):
        outline = [[x, 0, x + 40, 0, x + 40, 40, x, 40]]
        return {"bbox": [x, 0, 40, 40], "segmentation": outline}

    def found(x, score):
        mask = rle.frPyObjects(shape(x)["segmentation"], HEIGHT, WIDTH)[0]
        mask = {**mask, "counts": mask["counts"].decode()}
        here = {"bbox": shape(x)["bbox"]} if task == "bbox" else {"segmentation": mask}
        return {"image_id": 0, "category_id": 2, "score": score, **here}

    truth = random_truth(np.random.default_rng(6), 1, 1, per_image=2)
    for each, x in zip(truth["annotations"], (0, 8), strict=True):
        each.update(shape(x), area=1600, iscrowd=0)
    ours, theirs = both(truth, [found(4, 0.9), found(second, 0.8)], task)
    assert_same_curves(ours, theirs)
    assert (ours.matches.outcomes[5, 0].tolist() == [1, 1]) is right


def test_some_images_alone_and_ids_of_any_kind():
    """An object has the id 0, which pycocotools treats as no object."""
    rng = np.random.default_rng(7)
    truth = random_truth(rng, 8, 2, per_image=12)
    for image in truth["images"]:
        image["id"] = f"image {image['id']}"
    for each in truth["annotations"]:
        each["image_id"] = f"image {each['image_id']}"
        each["id"] -= 1
    results = random_results(rng, truth, "bbox")
    every, _ = both(truth, results, "bbox")
    ours, theirs = both(truth, results, "bbox", images=["image 30", "image 0"])
    assert_same_curves(ours, theirs)
    assert np.abs(ours.eval["precision"] - every.eval["precision"]).max() > 0.01


def peak_memory(evaluation):
    """Returns the bytes that another evaluation allocates."""
    tracemalloc.start()
    evaluation.evaluate()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_in_parts_to_save_memory(task, monkeypatch):
    rng = np.random.default_rng(14)
    truth = random_truth(rng, 12, 3, per_image=24)
    results = random_results(rng, truth, task)
    ours, theirs = both(truth, results, task)
    assert_same_curves(ours, theirs)
    whole = peak_memory(ours)
    monkeypatch.setattr(coco_ap, "PAIRS_AT_ONCE", 20)
    assert peak_memory(ours) < whole / 2
    ours.accumulate()
    assert_same_curves(ours, theirs)


def test_more_masks_than_a_byte_counts():
    rng = np.random.default_rng(8)
    truth = random_truth(rng, 1, 1, per_image=300)
    ours, theirs = both(truth, random_results(rng, truth, "segm", 40), "segm", limit=1000)
    assert len(ours.matches.scores) > 256
    assert_same_curves(ours, theirs)


def test_run_lengths_are_pycocotools():
    rng = np.random.default_rng(9)
    masks = rng.random((12, 23, 31)) < rng.random((12, 1, 1)) ** 3
    masks[0], masks[1] = False, True
    for i, part in enumerate(
        [np.s_[:, 0], np.s_[:, -1], np.s_[0, 0], np.s_[-1, -1], np.s_[3:9, 4]]
    ):
        masks[2 + i] = False
        masks[2 + i][part] = True
    for mask, ours in zip(masks, encode_masks(torch.from_numpy(masks)), strict=True):
        theirs = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert ours == {"size": [23, 31], "counts": theirs["counts"].decode()}
    assert encode_masks(torch.from_numpy(masks[:0])) == []


# Under autocast on a CPU, scores are in half precision.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masks", [False, True])
def test_file_of_detections_is_detectron2s(evaluated, tmp_path, masks, dtype):
    rng = np.random.default_rng(10)
    truth = random_truth(rng, 4, 3)
    found = {10 * i: random_detections(rng, truth, 10 * i, masks) for i in range(4)}
    for instances in found.values():
        instances.scores = instances.scores.to(dtype)
    evaluated(truth, found, "MODEL.MASK_ON", str(masks))
    (ours,) = tmp_path.glob("inference/*/coco_instances_results.json")
    name, folder = ours.parent.name, tmp_path / "theirs"
    theirs = COCOEvaluator(name, output_dir=str(folder), use_fast_impl=False)
    theirs.reset()
    for image, instances in found.items():
        theirs.process([{"image_id": image}], [{"instances": instances}])
    theirs.evaluate()
    assert ours.read_text() == (folder / "coco_instances_results.json").read_text()


def test_tasks_come_from_the_output_where_the_model_does_not_say(evaluated):
    rng = np.random.default_rng(11)
    truth = random_truth(rng, 3, 2)
    for masks in (False, True):
        found = {10 * i: random_detections(rng, truth, 10 * i, masks) for i in range(3)}
        results, _ = evaluated(truth, found, "MODEL.META_ARCHITECTURE", "PanopticFPN")
        assert list(results) == (["bbox", "segm"] if masks else ["bbox"])


def test_classes_that_the_data_set_does_not_have(evaluated):
    rng = np.random.default_rng(12)
    truth = random_truth(rng, 3, 2)
    found = {0: random_detections(rng, random_truth(rng, 3, 5), 0, False)}
    with pytest.raises(UserError, match=r"class 4 .*2 classes"):
        evaluated(truth, found)


def test_keypoints_are_left_to_detectron2(evaluated, tmp_path):
    rng = np.random.default_rng(13)
    truth = random_truth(rng, 1, 2)
    evaluated(truth, {0: random_detections(rng, truth, 0, False)})
    name = next(tmp_path.glob("inference/*")).name
    for options, expected in [([], ArrayCOCOEvaluator), (["True"], COCOEvaluator)]:
        cfg = load_config(LEAF, ["MODEL.KEYPOINT_ON"] * bool(options) + options)
        evaluator = build_coco_evaluator(cfg, name, str(tmp_path))
        assert isinstance(evaluator, expected)
        assert isinstance(evaluator, ArrayCOCOEvaluator) == (expected is ArrayCOCOEvaluator)
