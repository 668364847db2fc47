"""Evaluates a model on the config's test sets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.evaluation import inference_on_dataset, verify_results
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.mappers import ClassificationMapper, NamedErrors
from contnet.evaluation.build import build_evaluator
from contnet.evaluation.results import markdown_tables, record_results
from contnet.modeling.amp import autocast
from contnet.modeling.tta import tta_class
from contnet.utils.files import NO_GUARD, WriteGuard

__all__ = ["evaluate"]

logger = logging.getLogger(__name__)


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
        load_dataset_dicts(cfg, [name], train=False) if dicts is None else dicts,
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
    guard: WriteGuard = NO_GUARD,
) -> dict[str, dict]:
    """Evaluates on every data set of DATASETS.TEST, over all processes; prints and records it.

    Args:
        cfg: the config.
        model: takes Detectron2's inputs.
        iteration: the last one that trained it, for results.json.
        weights: the file it comes from, for results.json; None in training.
        tta: evaluate also with test-time augmentation, as tasks that end with ``_TTA``.
        dicts: of data sets that are loaded already, by name; the others are loaded.
        guard: is asked before results.json is written.

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
        ema = cfg.SOLVER.EMA.ENABLED
        if given := {name: metrics for name, metrics in results.items() if metrics}:
            record_results(
                cfg.OUTPUT_DIR, given, iteration=iteration, weights=weights, ema=ema, guard=guard
            )
    if len(results) == 1:
        (results,) = results.values()
    if comm.is_main_process():
        verify_results(cfg, results)
    return results
