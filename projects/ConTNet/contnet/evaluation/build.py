"""Builds the evaluator of a data set, which computes the data set's own metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from contnet.data.datasets.classes import dataset_class_names
from contnet.data.validation.dataset import has_truth
from contnet.evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from contnet.evaluation.cityscapes_coco import NumberedImages, as_coco
from contnet.evaluation.classification import ClassificationEvaluator
from contnet.evaluation.coco import build_coco_evaluator
from contnet.evaluation.server_files import CityscapesInstanceFiles, CityscapesSemSegFiles
from contnet.utils.errors import UserError

__all__ = ["EVALUATORS", "build_evaluator", "check_evaluator"]


class _Several(DatasetEvaluators):
    """Detectron2's DatasetEvaluators, which also forwards skipped images and collects warnings."""

    def skip(self, images: Sequence[dict]) -> None:
        for evaluator in self._evaluators:
            if hasattr(evaluator, "skip"):
                evaluator.skip(images)

    @property
    def warnings(self) -> list[str]:
        return [line for each in self._evaluators for line in getattr(each, "warnings", ())]


def _build_cityscapes_instance(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    if not has_truth(cfg, name):
        if not cfg.MODEL.MASK_ON:
            raise UserError(
                f"data set {name} has no ground truth, and Cityscapes' server accepts no boxes: "
                "evaluate a model with MODEL.MASK_ON True"
            )
        return CityscapesInstanceFiles(name, folder)
    coco = NumberedImages(build_coco_evaluator(cfg, as_coco(name, folder), folder), name)
    if not cfg.MODEL.MASK_ON:
        return coco
    return _Several([CityscapesInstanceEvaluator(name), coco])


def _build_cityscapes_sem_seg(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    if not has_truth(cfg, name):
        return CityscapesSemSegFiles(name, folder)
    return CityscapesSemSegEvaluator(name, folder)


def _build_classification(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    names = dataset_class_names(cfg, [name])
    classes = len(names) if names else cfg.MODEL.CLASSIFIER.NUM_CLASSES
    return ClassificationEvaluator(classes, folder, names)


# Functions by the evaluator_type of a data set's metadata. Each builds an evaluator from the
# config, the data set's name and a folder for its files. A training builds it once, and resets it
# before each evaluation. Data sets of another kind need an entry here.
EVALUATORS: dict[str, Callable[[CfgNode, str, str], DatasetEvaluator]] = {
    "coco": build_coco_evaluator,
    "cityscapes_instance": _build_cityscapes_instance,
    "cityscapes_sem_seg": _build_cityscapes_sem_seg,
    "classification": _build_classification,
}


def check_evaluator(name: str) -> None:
    """Checks that there is an evaluator for a registered data set.

    Raises:
        UserError: if ``EVALUATORS`` has none for its kind.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise UserError(
            f"data set {name} of DATASETS.TEST has no evaluator: its evaluator_type is "
            f"{kind!r}, not one of {', '.join(EVALUATORS)}. Remove it, or add an entry to "
            "contnet.evaluation.build.EVALUATORS (docs/architecture.md)"
        )


def build_evaluator(cfg: CfgNode, name: str) -> DatasetEvaluator:
    """Builds the evaluator of a data set.

    Raises:
        UserError: if ``EVALUATORS`` has none for its kind, or it cannot be built.
    """
    check_evaluator(name)
    kind = MetadataCatalog.get(name).evaluator_type
    try:
        return EVALUATORS[kind](cfg, name, str(Path(cfg.OUTPUT_DIR, "inference", name)))
    except ImportError as error:
        raise UserError(
            f"data set {name} of DATASETS.TEST cannot be evaluated ({error}): install what its "
            f"evaluator for the type {kind!r} requires"
        ) from error
