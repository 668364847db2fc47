"""Evaluation of a model on the config's test sets by the data sets' own metrics."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_on_dataset,
    verify_results,
)
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from contnet.data.pipeline.transforms import ClassificationMapper
from contnet.data.validation.datasets import load_dicts
from contnet.data.validation.images import NamedErrors
from contnet.evaluation.cityscapes import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    NumberedImages,
    as_coco,
)
from contnet.evaluation.classification import ClassificationEvaluator, ranks
from contnet.evaluation.coco import COCO_METRICS, build_coco_evaluator, coco_tasks
from contnet.evaluation.results import markdown_tables, record_results
from contnet.modeling.amp import autocast
from contnet.modeling.tta import tta_class
from contnet.utils.errors import UserError

__all__ = ["build_evaluator", "check_best_metric", "evaluate", "main_metric"]

# The one number of a data set: the first of these that its evaluators give.
MAIN_METRICS = (
    "cityscapes/AP",
    "segm/AP",
    "bbox/AP",
    "sem_seg/IoU",
    "sem_seg/mIoU",
    "classification/top1",
)

logger = logging.getLogger(__name__)


def build_evaluator(cfg: CfgNode, name: str) -> DatasetEvaluator:
    """The evaluator that fits a data set.

    Raises:
        UserError: if its kind has none here.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    folder = str(Path(cfg.OUTPUT_DIR, "inference", name))
    if kind == "coco":
        return build_coco_evaluator(cfg, name, folder)
    if kind == "cityscapes_instance":
        coco = NumberedImages(build_coco_evaluator(cfg, as_coco(name, folder), folder), name)
        if not cfg.MODEL.MASK_ON:
            return coco
        return DatasetEvaluators([CityscapesInstanceEvaluator(name), coco])
    if kind == "cityscapes_sem_seg":
        return CityscapesSemSegEvaluator(name)
    if kind == "classification":
        return ClassificationEvaluator(cfg.MODEL.CLASSIFIER.NUM_CLASSES)
    raise UserError(f"data set {name} has no evaluator here, its type is {kind!r}")


def _known_metrics(cfg: CfgNode, name: str) -> list[str]:
    """What an evaluator will give, where that can be told before it has run."""
    metadata = MetadataCatalog.get(name)
    kind = metadata.get("evaluator_type")
    things = metadata.get("thing_classes", [])
    metrics = [*COCO_METRICS, *(f"AP-{each}" for each in things if len(things) > 1)]
    known = {f"{task}/{metric}" for task in coco_tasks(cfg) or [] for metric in metrics}
    if kind == "cityscapes_instance" and cfg.MODEL.MASK_ON:
        known |= {f"cityscapes/{metric}" for metric in ("AP", "AP50")}
        known |= {f"cityscapes/{metric}-{each}" for metric in ("AP", "AP50") for each in things}
    elif kind == "cityscapes_sem_seg":
        known = {f"sem_seg/{metric}" for metric in ("IoU", "iIoU", "IoU_sup", "iIoU_sup")}
        known |= {f"sem_seg/IoU-{each}" for each in metadata.stuff_classes}
    elif kind == "classification":
        known = {f"classification/top{rank}" for rank in ranks(cfg.MODEL.CLASSIFIER.NUM_CLASSES)}
    prefix = f"{name}/" if len(cfg.DATASETS.TEST) > 1 else ""
    return sorted(prefix + metric for metric in known)


def _check_metric(wanted: str, metrics: Iterable[str]) -> None:
    metrics = list(metrics)
    if not wanted or wanted in metrics:
        return
    near = difflib.get_close_matches(wanted, metrics, n=1)
    hint = f", the nearest is {near[0]}" if near else ""
    main = ", ".join(name for name in metrics if "-" not in name.rpartition("/")[2])
    raise UserError(f"TEST.BEST_METRIC is {wanted!r}{hint}; there are {main or 'no metrics'}")


def check_best_metric(cfg: CfgNode) -> None:
    """Checks TEST.BEST_METRIC before any evaluation, as far as the evaluators are known.

    Raises:
        UserError: naming the metrics that there are.
    """
    known = [_known_metrics(cfg, name) for name in cfg.DATASETS.TEST]
    if all(known):
        _check_metric(cfg.TEST.BEST_METRIC, [metric for each in known for metric in each])


def main_metric(cfg: CfgNode, metrics: Iterable[str]) -> str:
    """The metric that says which weights are best, "" if there is none.

    Args:
        cfg: TEST.BEST_METRIC, or by default the first data set's main metric.
        metrics: names of all that an evaluation gave, as metrics.json has them.

    Raises:
        UserError: if TEST.BEST_METRIC is not one of them.
    """
    if cfg.TEST.BEST_METRIC:
        _check_metric(cfg.TEST.BEST_METRIC, metrics)
        return cfg.TEST.BEST_METRIC
    prefix = f"{cfg.DATASETS.TEST[0]}/" if len(cfg.DATASETS.TEST) > 1 else ""
    given = set(metrics)
    return next((prefix + name for name in MAIN_METRICS if prefix + name in given), "")


def _share_buffers(model: nn.Module) -> None:
    """Gives all processes rank 0's running statistics, which are those that are saved."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def _build_test_loader(
    cfg: CfgNode, name: str, dicts: Sequence[dict] | None, mapper: Callable | None
) -> DataLoader:
    if cfg.MODEL.LOAD_PROPOSALS:
        return build_detection_test_loader(cfg, name, mapper=mapper)
    batch_size = 1
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        mapper, batch_size = ClassificationMapper(cfg, is_train=False), cfg.TEST.IMS_PER_PROCESS
    return build_detection_test_loader(
        load_dicts(cfg, [name], train=False) if dicts is None else dicts,
        mapper=NamedErrors(mapper or DatasetMapper(cfg, is_train=False)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        batch_size=batch_size,
    )


def _inference(
    cfg: CfgNode,
    model: nn.Module,
    name: str,
    dicts: Sequence[dict] | None,
    mapper: Callable | None = None,
) -> dict:
    loader = _build_test_loader(cfg, name, dicts, mapper)
    with autocast(cfg):
        return inference_on_dataset(model, loader, build_evaluator(cfg, name)) or {}


def _inference_tta(cfg: CfgNode, model: nn.Module, name: str, dicts: Sequence[dict] | None) -> dict:
    """The same with test-time augmentation; its predictions go into a folder of their own."""
    logger.info("Evaluating with test-time augmentation")
    model = tta_class(cfg.MODEL.META_ARCHITECTURE)(cfg, model).train(model.training)
    # Views are made of the images as they are on the disk, each by one resizing.
    mapper = DatasetMapper(cfg, is_train=False, augmentations=[])
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR, "tta"))
    results = _inference(cfg, model, name, dicts, mapper)
    return {f"{task}_TTA": metrics for task, metrics in results.items()}


def evaluate(
    cfg: CfgNode,
    model: nn.Module,
    *,
    iteration: int | None = None,
    weights: str | None = None,
    tta: bool = False,
    dicts: Mapping[str, Sequence[dict]] | None = None,
) -> dict[str, dict]:
    """Evaluates on every data set of DATASETS.TEST, over all processes; prints and records it.

    Args:
        cfg: the config.
        model: takes Detectron2's inputs.
        iteration: the last one that trained it, for results.json.
        weights: the file it comes from, for results.json; None in training.
        tta: evaluate also with test-time augmentation, as tasks that end with ``_TTA``.
        dicts: of data sets that are loaded already, by name; the others are loaded.

    Returns:
        On the main process the metrics by task (by data set and task, if there are several data
        sets), otherwise an empty dict.
    """
    _share_buffers(model)
    results = {}
    for name in cfg.DATASETS.TEST:
        loaded = dicts and dicts.get(name)
        metrics = _inference(cfg, model, name, loaded)
        if tta:
            metrics = {**metrics, **_inference_tta(cfg, model, name, loaded)}
        if comm.is_main_process():
            if metrics:
                logger.info(f"Results:\n\n{markdown_tables(name, metrics)}\n")
            results[name] = metrics
    if comm.is_main_process():
        averaged = cfg.SOLVER.EMA.ENABLED
        if given := {name: metrics for name, metrics in results.items() if metrics}:
            record_results(
                cfg.OUTPUT_DIR, given, iteration=iteration, weights=weights, averaged=averaged
            )
    if len(results) == 1:
        (results,) = results.values()
    if comm.is_main_process():
        verify_results(cfg, results)
    return results
