"""Builds the evaluator of a data set, which computes the data set's own metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from contnet.data.datasets.classes import dataset_class_names
from contnet.evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from contnet.evaluation.cityscapes_coco import NumberedImages, as_coco
from contnet.evaluation.classification import ClassificationEvaluator
from contnet.evaluation.coco import build_coco_evaluator
from contnet.utils.errors import UserError

__all__ = ["EVALUATORS", "build_evaluator"]


def _build_cityscapes_instance(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    coco = NumberedImages(build_coco_evaluator(cfg, as_coco(name, folder), folder), name)
    if not cfg.MODEL.MASK_ON:
        return coco
    return DatasetEvaluators([CityscapesInstanceEvaluator(name), coco])


def _build_cityscapes_sem_seg(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return CityscapesSemSegEvaluator(name)


def _build_classification(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    names = dataset_class_names(cfg, [name])
    return ClassificationEvaluator(len(names) if names else cfg.MODEL.CLASSIFIER.NUM_CLASSES)


# By the evaluator_type of a data set's metadata: makes an evaluator from the config, the data set's
# name and a folder for its files. A training makes it once, and resets it before each evaluation.
# Data sets of another kind add theirs.
EVALUATORS: dict[str, Callable[[CfgNode, str, str], DatasetEvaluator]] = {
    "coco": build_coco_evaluator,
    "cityscapes_instance": _build_cityscapes_instance,
    "cityscapes_sem_seg": _build_cityscapes_sem_seg,
    "classification": _build_classification,
}


def build_evaluator(cfg: CfgNode, name: str) -> DatasetEvaluator:
    """The evaluator that fits a data set.

    Raises:
        UserError: if ``EVALUATORS`` has none for its kind.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise UserError(f"data set {name} has no evaluator here, its type is {kind!r}")
    return EVALUATORS[kind](cfg, name, str(Path(cfg.OUTPUT_DIR, "inference", name)))
