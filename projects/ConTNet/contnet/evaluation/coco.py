"""COCO's AP of boxes and masks: Detectron2's evaluator on arrays, with pycocotools' numbers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pycocotools import mask as rle

from contnet.evaluation.coco_ap import ArrayEvaluation, Detections, Matches, encode_masks
from contnet.utils.errors import UserError

__all__ = ["COCO_METRICS", "ArrayCOCOEvaluator", "build_coco_evaluator", "coco_tasks"]

COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def _read_instances(image_id: object, instances: Instances) -> Detections:
    """What a model found in one image; categories are the model's numbers."""
    boxes = instances.pred_boxes.tensor.numpy()
    masks = None
    if instances.has("pred_masks"):
        masks = encode_masks(instances.pred_masks.bool())
    return Detections(
        np.repeat(np.array([image_id]), len(instances)),
        instances.pred_classes.numpy(),
        instances.scores.double().numpy(),  # NumPy has no bfloat16
        BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).astype(float),
        masks,
        np.array([rle.area(mask) for mask in masks or ()], dtype=float),
    )


class ArrayCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator of boxes and masks; each process matches what it has found.

    A model without any detection has AP 0, not none. The file of detections is Detectron2's.
    """

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Keeps the ``instances`` of some images; see Detectron2's."""
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to(self._cpu_device)
            self._predictions.append(_read_instances(image["image_id"], instances))

    def evaluate(self, img_ids: Sequence | None = None) -> dict[str, dict[str, float]]:
        """The metrics of each task on the main process, elsewhere an empty dict.

        Args:
            img_ids: of the images to evaluate on; all by default.
        """
        found = self._join(self._predictions)
        evaluations = {}
        if self._do_evaluation:
            for task in self._tasks or ["bbox"] + ["segm"] * (found.masks is not None):
                evaluations[task] = self._match(found, task, img_ids)
        mine = (found, {task: each.matches for task, each in evaluations.items()})
        parts = comm.gather(mine) if self._distributed else [mine]
        if not comm.is_main_process():
            return {}
        if self._output_dir:
            self._write([each for each, _ in parts])
        results = {}
        for task, evaluation in evaluations.items():
            evaluation.matches = Matches.join([matches[task] for _, matches in parts])
            evaluation.accumulate()
            evaluation.summarize()
            names = self._metadata.get("thing_classes")
            results[task] = self._derive_coco_results(evaluation, task, class_names=names)
        return results

    def _join(self, parts: Sequence[Detections]) -> Detections:
        """All that this process has found, with the data set's category ids."""
        # A process without images goes with the others, whether they have masks or not.
        masks = None if any(each.masks is None for each in parts) else []
        if masks is not None:
            masks = [mask for each in parts for mask in each.masks]

        def join(name: str, empty: np.ndarray) -> np.ndarray:
            return np.concatenate([getattr(each, name) for each in parts] or [empty])

        classes = join("categories", np.zeros(0, dtype=int))
        if numbers := self._metadata.get("thing_dataset_id_to_contiguous_id"):
            if classes.max(initial=0) >= len(numbers):
                raise UserError(
                    f"a model with class {classes.max()} cannot be evaluated on a data set of "
                    f"{len(numbers)} classes: set its number of classes"
                )
            classes = np.array(sorted(numbers, key=numbers.get))[classes]
        return Detections(
            join("images", np.zeros(0, dtype=int)),
            classes,
            join("scores", np.zeros(0)),
            join("boxes", np.zeros((0, 4))),
            masks,
            join("mask_areas", np.zeros(0)),
        )

    def _match(self, found: Detections, task: str, img_ids: Sequence | None) -> ArrayEvaluation:
        evaluation = ArrayEvaluation(self._coco_api, found, task)
        evaluation.params.maxDets = self._max_dets_per_image
        if img_ids is not None:
            evaluation.params.imgIds = img_ids
        evaluation.evaluate()
        return evaluation

    def _write(self, parts: Sequence[Detections]) -> None:
        """Writes the detections in COCO's form."""
        PathManager.mkdirs(self._output_dir)
        results = (result for found in parts for result in _as_results(found))
        path = Path(self._output_dir, "coco_instances_results.json")
        with PathManager.open(str(path), "w") as file:
            file.write("[")
            separator = ""
            # Not all at once, for the memory's sake.
            while some := list(itertools.islice(results, 1000)):
                file.write(separator + json.dumps(some)[1:-1])
                separator = ", "
            file.write("]")


def _as_results(found: Detections) -> Iterator[dict]:
    rows = zip(
        found.images.tolist(),
        found.categories.tolist(),
        found.boxes.tolist(),
        found.scores.tolist(),
        found.masks or itertools.repeat(None),
        strict=False,
    )
    for image, category, box, score, mask in rows:
        result = {"image_id": image, "category_id": category, "bbox": box, "score": score}
        if mask is not None:
            result["segmentation"] = mask
        yield result


def coco_tasks(cfg: CfgNode) -> Sequence[str] | None:
    """Tasks that a model's output is evaluated on; None to take them from the output."""
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if isinstance(model, type) and issubclass(model, DenseDetector):
        return ["bbox"]
    if model is not GeneralizedRCNN:
        return None
    masks = ["segm"] if cfg.MODEL.MASK_ON else []
    return ["bbox", *masks, *(["keypoints"] if cfg.MODEL.KEYPOINT_ON else [])]


def build_coco_evaluator(cfg: CfgNode, name: str, folder: str) -> COCOEvaluator:
    """The evaluator of a data set in COCO's form.

    Args:
        cfg: TEST.DETECTIONS_PER_IMAGE is the most detections of an image and class that count.
        name: of the data set.
        folder: for the predictions.

    Returns:
        Detectron2's own on pycocotools for models of keypoints or of proposals alone.
    """
    options = {
        "tasks": coco_tasks(cfg),
        "output_dir": folder,
        "max_dets_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "use_fast_impl": False,
    }
    if cfg.MODEL.KEYPOINT_ON or cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        return COCOEvaluator(name, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS, **options)
    return ArrayCOCOEvaluator(name, **options)
