"""COCO's AP of boxes and masks: Detectron2's evaluator on arrays, with pycocotools' results."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval

from contnet.data.datasets.classes import distinct_class_names
from contnet.evaluation.coco_ap import ArrayEvaluation, Detections, Matches, encode_masks
from contnet.utils.errors import UserError
from contnet.utils.files import writing

__all__ = [
    "COCO_RESULTS_FILE",
    "ArrayCOCOEvaluator",
    "build_coco_evaluator",
    "coco_class_names",
    "coco_metrics",
    "coco_tasks",
]

COCO_RESULTS_FILE = "coco_instances_results.json"  # Detectron2's name
_PRECISIONS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_KEYPOINT_RECALLS = ("AR", "AR50", "AR75", "ARm", "ARl")


def _recalls(limit: int) -> list[str]:
    """Names of the average recalls of boxes or masks, in pycocotools' order."""
    return [*(f"AR@{most}" for most in sorted((1, 10, limit))), "ARs", "ARm", "ARl"]


def coco_metrics(limit: int) -> list[str]:
    """Names of the metrics of boxes or masks, without those of single classes.

    Args:
        limit: TEST.DETECTIONS_PER_IMAGE.
    """
    return list(dict.fromkeys([*_PRECISIONS, *_recalls(limit)]))


def coco_class_names(name: str) -> list[str]:
    """Unique names of a loaded data set's classes; [] if they are unknown."""
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes") or []
    numbers = metadata.get("thing_dataset_id_to_contiguous_id")
    ids = sorted(numbers, key=numbers.get) if numbers else range(len(names))
    return distinct_class_names(names, ids)


def _read_instances(image_id: object, instances: Instances) -> Detections:
    """The detections of one image; categories are the model's class indices."""
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


class _FullCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator with average recalls, and separate metrics if class names repeat."""

    def __init__(self, name: str, **options):
        super().__init__(name, **options)
        # Detectron2 only checks whether there is a list of annotations, which may be empty.
        self._do_evaluation = bool(self._coco_api.dataset.get("annotations"))

    @property
    def results_file(self) -> Path:
        """The file of detections; without ground truth, its name is the one for COCO's server."""
        if self._do_evaluation:
            return Path(self._output_dir, COCO_RESULTS_FILE)
        # For example, test-dev2017 for COCO's image_info_test-dev2017.json.
        test_set = Path(self._metadata.json_file).stem.removeprefix("image_info_")
        return Path(self._output_dir, f"detections_{test_set}_contnet_results.json")

    @property
    def warnings(self) -> list[str]:
        if self._do_evaluation:
            return []
        line = f"{self._metadata.name} has no annotations: no metrics"
        if self.results_file.exists():  # proposals have no such file
            line += (
                "; the detections, in the format of COCO's server, are in "
                f"{self.results_file.absolute()}"
            )
        return [line]

    def _eval_predictions(self, predictions: list, img_ids: Sequence | None = None) -> None:
        super()._eval_predictions(predictions, img_ids)
        if not self._do_evaluation:
            os.replace(Path(self._output_dir, COCO_RESULTS_FILE), self.results_file)

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        names = coco_class_names(self._metadata.name) or class_names
        results = super()._derive_coco_results(coco_eval, iou_type, names)
        recalls = _recalls(self._max_dets_per_image[-1])
        if iou_type == "keypoints":
            recalls = _KEYPOINT_RECALLS
        values = [-1] * len(recalls) if coco_eval is None else coco_eval.stats[-len(recalls) :]
        for recall, value in zip(recalls, values, strict=True):
            results[recall] = float(100 * value) if value >= 0 else float("nan")
        return results


class ArrayCOCOEvaluator(_FullCOCOEvaluator):
    """Detectron2's evaluator of boxes and masks; each process matches its own detections.

    A model without any detection has AP 0. The file of detections is the same as Detectron2's.
    """

    def reset(self) -> None:
        """Starts an evaluation, and creates the folder of its file."""
        super().reset()
        if self._output_dir and comm.is_main_process():
            Path(self._output_dir).mkdir(parents=True, exist_ok=True)

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Stores the ``instances`` of some images, as in Detectron2."""
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to(self._cpu_device)
            self._predictions.append(_read_instances(image["image_id"], instances))

    def evaluate(self, img_ids: Sequence | None = None) -> dict[str, dict[str, float]]:
        """Returns the metrics of each task on the main process, elsewhere an empty dict.

        Args:
            img_ids: ids of the images to evaluate on; by default all.
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
            results[task] = self._derive_coco_results(evaluation, task)
        return results

    def _join(self, parts: Sequence[Detections]) -> Detections:
        """Joins the detections of this process, with the data set's category ids."""
        # An empty list in a process without images, whether the model has masks or not.
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
        """Writes the detections in COCO format."""
        results = (result for found in parts for result in _as_results(found))
        with writing(self.results_file), open(self.results_file, "w") as file:
            file.write("[")
            separator = ""
            # In chunks, to save memory.
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
    """Builds the evaluator of a data set in COCO format.

    Args:
        cfg: config; TEST.DETECTIONS_PER_IMAGE is the maximum number of detections per image and
            class.
        name: name of the data set.
        folder: folder for the predictions.

    Returns:
        An :class:`ArrayCOCOEvaluator`; for keypoints and proposals, one that uses pycocotools.
    """
    options = {
        "tasks": coco_tasks(cfg),
        "output_dir": folder,
        "max_dets_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "use_fast_impl": False,
    }
    if cfg.MODEL.KEYPOINT_ON or cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        return _FullCOCOEvaluator(name, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS, **options)
    return ArrayCOCOEvaluator(name, **options)
