"""COCO evaluation of random detections, compared with Detectron2's evaluator and pycocotools."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.timing import print_ratios
from contnet.evaluation.coco import ArrayCOCOEvaluator
from contnet.evaluation.coco_ap import ArrayEvaluation, Detections

__all__ = ["add_arguments", "run"]

HEIGHT, WIDTH = 480, 640
CLASSES = 80
DETECTIONS = 100
# Number of images to time the encoding of masks.
MASK_IMAGES = 20
NAME = "benchmark_of_evaluation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=5000, metavar="N")
    parser.add_argument("--masks", action="store_true", help="masks instead of boxes")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="timed calls of each")
    parser.add_argument("--seed", type=int, default=0)


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Returns XYWH boxes (count, 4) inside the image, with log-uniform sizes."""
    sizes = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
    places = rng.uniform(size=(count, 2)) * (np.array([WIDTH, HEIGHT]) - sizes)
    return np.concatenate([places, sizes], axis=1)


def _outline(rng: np.random.Generator, box: np.ndarray) -> list[float]:
    """Returns a polygon with 24 corners in a box."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    around = 0.5 + around * rng.uniform(0.35, 0.5, (24, 1))
    return (box[:2] + around * box[2:]).round(2).ravel().tolist()


def make_truth(images: int, seed: int) -> dict:
    """Makes an annotation file with 7 objects per image on average, 2 % of them crowds."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image in range(1, images + 1):
        for box in _boxes(rng, rng.poisson(7)):
            crowd = bool(rng.random() < 0.02)
            outline = [_outline(rng, box)]
            mask = rle.merge(rle.frPyObjects(outline, HEIGHT, WIDTH))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(rng.integers(1, CLASSES + 1)),
                    "bbox": box.round(2).tolist(),
                    "area": float(rle.area(mask)),
                    "iscrowd": int(crowd),
                    "segmentation": {**mask, "counts": mask["counts"].decode()}
                    if crowd
                    else outline,
                }
            )
    return {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)],
    }


def make_detections(truth: dict, seed: int) -> Iterator[Instances]:
    """Yields 100 boxes per image: two near each object, one with a high score, and random boxes."""
    rng = np.random.default_rng([seed, 1])
    objects: dict[int, list[dict]] = {image["id"]: [] for image in truth["images"]}
    for each in truth["annotations"]:
        objects[each["image_id"]].append(each)
    for near in objects.values():
        boxes = _boxes(rng, DETECTIONS)
        classes = rng.integers(0, CLASSES, DETECTIONS)
        scores = rng.beta(1, 4, DETECTIONS)
        for i, each in enumerate(2 * near[: DETECTIONS // 2]):
            spread = 0.1 * np.array(2 * each["bbox"][2:])
            boxes[i] = np.array(each["bbox"]) + rng.normal(size=4) * spread
            classes[i] = each["category_id"] - 1
            scores[i] = rng.beta(4, 1 + 2 * (i >= len(near)))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], 4)
        boxes = BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        yield Instances(
            (HEIGHT, WIDTH),
            pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)),
            scores=torch.tensor(scores, dtype=torch.float32),
            pred_classes=torch.tensor(classes),
        )


def _run_lengths(rng: np.random.Generator, instances: Instances) -> list[dict]:
    """Makes a run-length encoded mask in each box."""
    boxes = instances.pred_boxes.tensor.numpy().astype(float)
    boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    masks = rle.frPyObjects([_outline(rng, box) for box in boxes], HEIGHT, WIDTH)
    return [{**mask, "counts": mask["counts"].decode()} for mask in masks]


def _as_arrays(found: list[Instances], masks: list[list[dict]] | None) -> Detections:
    boxes = np.concatenate([each.pred_boxes.tensor.numpy() for each in found])
    masks = [mask for each in masks for mask in each] if masks else None
    return Detections(
        np.repeat(np.arange(1, len(found) + 1), DETECTIONS),
        np.concatenate([each.pred_classes.numpy() + 1 for each in found]),
        np.concatenate([each.scores.numpy() for each in found]).astype(float),
        BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).astype(float),
        masks,
        np.array([rle.area(mask) for mask in masks or ()], dtype=float),
    )


def _as_results(found: Detections, task: str) -> list[dict]:
    rows = zip(found.images.tolist(), found.categories.tolist(), found.scores.tolist(), strict=True)
    results = [{"image_id": i, "category_id": c, "score": s} for i, c, s in rows]
    content = found.boxes.tolist() if task == "bbox" else map(dict, found.masks)
    for result, each in zip(results, content, strict=True):
        result["bbox" if task == "bbox" else "segmentation"] = each
    return results


class _Clock:
    """Times blocks of code by name, and discards what they print."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)


def _time_average_precision(file: Path, found: Detections, task: str, rounds: int) -> None:
    clock = _Clock()
    for _ in range(rounds):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(file))
            detections = truth.loadRes(_as_results(found, task))
        evaluations = {
            "pycocotools": COCOeval(truth, detections, task),
            "ours": ArrayEvaluation(COCO(str(file)), found, task),
        }
        for name, evaluation in evaluations.items():
            with clock(name):
                evaluation.evaluate()
                evaluation.accumulate()
    print(f"evaluate and accumulate, {task}, {len(found.scores)} detections")
    print_ratios(clock.seconds, "pycocotools")
    with contextlib.redirect_stdout(io.StringIO()):
        for evaluation in evaluations.values():
            evaluation.summarize()
    theirs, ours = (evaluation.stats for evaluation in evaluations.values())
    print(f"AP {100 * ours[0]:.3f}, largest difference of a metric {abs(ours - theirs).max():.1e}")


def _time_step(found: list[Instances], rounds: int) -> None:
    """Times the evaluation from a model's output to the metrics."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = {"output_dir": folder, "tasks": ["bbox"], "use_fast_impl": False}
        ways: dict[str, Callable] = {"Detectron2": COCOEvaluator, "ours": ArrayCOCOEvaluator}
        for _ in range(rounds):
            for name, evaluator_class in ways.items():
                with clock(name):
                    evaluator = evaluator_class(NAME, **options)
                    evaluator.reset()
                    for i, instances in enumerate(found):
                        evaluator.process([{"image_id": i + 1}], [{"instances": instances}])
                    evaluator.evaluate()
    print(f"whole evaluation, boxes of {len(found)} images")
    print_ratios(clock.seconds, "Detectron2")


def _time_encoding(found: list[Instances], masks: list[list[dict]]) -> None:
    clock = _Clock()
    ways = {
        "Detectron2": COCOEvaluator(NAME, tasks=["segm"], use_fast_impl=False),
        "ours": ArrayCOCOEvaluator(NAME, tasks=["segm"], use_fast_impl=False),
    }
    for i, (instances, encoded) in enumerate(zip(found, masks, strict=False)):
        if i == MASK_IMAGES:
            break
        instances = Instances((HEIGHT, WIDTH), **instances.get_fields())
        drawn = np.ascontiguousarray(rle.decode(encoded).transpose(2, 0, 1))
        instances.pred_masks = torch.from_numpy(drawn).bool()
        for name, evaluator in ways.items():
            evaluator.reset()
            with clock(name):
                evaluator.process([{"image_id": i + 1}], [{"instances": instances}])
    print(f"encoding the masks of an image, {DETECTIONS} of {HEIGHT}x{WIDTH}")
    print_ratios(clock.seconds, "Detectron2")


def run(args: argparse.Namespace) -> None:
    truth = make_truth(args.images, args.seed)
    found = list(make_detections(truth, args.seed))
    rng = np.random.default_rng([args.seed, 2])
    masks = [_run_lengths(rng, each) for each in found] if args.masks else None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "truth.json")
        file.write_text(json.dumps(truth))
        numbers = {i: i - 1 for i in range(1, CLASSES + 1)}
        names = [each["name"] for each in truth["categories"]]
        MetadataCatalog.get(NAME).set(
            json_file=str(file), thing_classes=names, thing_dataset_id_to_contiguous_id=numbers
        )
        task = "segm" if args.masks else "bbox"
        _time_average_precision(file, _as_arrays(found, masks), task, args.rounds)
        if masks:
            _time_encoding(found, masks)
        else:
            _time_step(found, args.rounds)
