"""Evaluation of a model on the config's test sets by the data sets' own metrics."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.utils import comm
from torch import nn

from contnet.engine.cityscapes_evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    NumberedImages,
    as_coco,
)
from contnet.engine.precision import autocast
from contnet.errors import UserError

__all__ = ["build_evaluator", "evaluate"]


def build_evaluator(cfg: CfgNode, name: str) -> DatasetEvaluator:
    """The evaluator that fits a data set.

    Raises:
        UserError: if its kind has none here.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    folder = str(Path(cfg.OUTPUT_DIR, "inference", name))
    if kind == "coco":
        return COCOEvaluator(name, output_dir=folder)
    if kind == "cityscapes_instance":
        coco = NumberedImages(COCOEvaluator(as_coco(name, folder), output_dir=folder), name)
        if not cfg.MODEL.MASK_ON:
            return coco
        return DatasetEvaluators([CityscapesInstanceEvaluator(name), coco])
    if kind == "cityscapes_sem_seg":
        return CityscapesSemSegEvaluator(name)
    raise UserError(f"data set {name} has no evaluator here, its type is {kind!r}")


def _share_buffers(model: nn.Module) -> None:
    """Gives all processes rank 0's running statistics, which are those that are saved."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, dict]:
    """Evaluates on every data set of DATASETS.TEST, over all processes.

    Args:
        cfg: the config.
        model: takes Detectron2's inputs.

    Returns:
        On the main process the metrics by task (by data set and task, if there are several data
        sets), otherwise an empty dict.
    """
    _share_buffers(model)
    results = {}
    for name in cfg.DATASETS.TEST:
        loader = build_detection_test_loader(cfg, name)
        with autocast(cfg):
            result = inference_on_dataset(model, loader, build_evaluator(cfg, name)) or {}
        if comm.is_main_process():
            print_csv_format(result)
            results[name] = result
    if len(results) == 1:
        (results,) = results.values()
    if comm.is_main_process():
        verify_results(cfg, results)
    return results
