"""COCO's AP of boxes and masks through faster-coco-eval, which computes pycocotools' numbers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

try:
    from faster_coco_eval import COCOeval_faster
except ImportError as error:
    raise ImportError(
        "COCO evaluation needs faster-coco-eval: pip install 'faster-coco-eval>=1.8,<2'"
    ) from error

__all__ = ["COCO_METRICS", "FastCOCOEvaluator", "build_coco_evaluator", "coco_tasks"]

COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def _evaluation(ground_truth: COCO, detections: COCO, task: str) -> COCOeval | COCOeval_faster:
    """One evaluation, not yet run; the fast one fails on keypoints."""
    if task == "keypoints":
        return COCOeval(ground_truth, detections, task)
    return COCOeval_faster(ground_truth, detections, task, print_function=print)


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator, for which a model without any detection has AP 0, not none."""

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None) -> dict[str, float]:
        if coco_eval is None:
            coco_eval = self._without_detections(iou_type)
        return super()._derive_coco_results(coco_eval, iou_type, class_names)

    def _without_detections(self, task: str):
        nothing = COCO()
        nothing.dataset = {**self._coco_api.dataset, "annotations": []}
        with contextlib.redirect_stdout(io.StringIO()):
            nothing.createIndex()
        evaluation = _evaluation(self._coco_api, nothing, task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation


def coco_tasks(cfg: CfgNode) -> Sequence[str] | None:
    """Tasks that a model's output is evaluated on; None to take them from the output."""
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if isinstance(model, type) and issubclass(model, DenseDetector):
        return ["bbox"]
    if model is not GeneralizedRCNN:
        return None
    masks = ["segm"] if cfg.MODEL.MASK_ON else []
    return ["bbox", *masks, *(["keypoints"] if cfg.MODEL.KEYPOINT_ON else [])]


def build_coco_evaluator(cfg: CfgNode, name: str, folder: str) -> FastCOCOEvaluator:
    """The evaluator of a data set in COCO's form.

    Args:
        cfg: TEST.DETECTIONS_PER_IMAGE is the most detections of an image and class that count.
        name: of the data set.
        folder: for the predictions.
    """
    # Detectron2 takes these two from its module: its own compiled one, and pycocotools for other
    # limits than 100 detections.
    coco_evaluation.COCOeval_opt = coco_evaluation.COCOevalMaxDets = _evaluation
    return FastCOCOEvaluator(
        name,
        tasks=coco_tasks(cfg),
        output_dir=folder,
        max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
