"""Evaluates a model on the config's test sets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, build_detection_test_loader
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, verify_results
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from contnet.data.datasets.classes import dataset_class_names
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.mappers import ClassificationMapper, NamedErrors
from contnet.data.pipeline.records import Records
from contnet.evaluation.build import build_evaluator
from contnet.evaluation.results import markdown_tables, record_results
from contnet.evaluation.subset import share_classes
from contnet.modeling.amp import autocast
from contnet.modeling.tta import tta_class
from contnet.utils.files import NO_GUARD, WriteGuard

__all__ = ["Evaluator"]

logger = logging.getLogger(__name__)


def _share_buffers(model: nn.Module) -> None:
    """Gives all processes rank 0's running statistics, which are those that are saved."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def _build_test_loader(
    cfg: CfgNode, name: str, dataset: Records | DatasetFromList, mapper: Callable | None
) -> DataLoader:
    if cfg.MODEL.LOAD_PROPOSALS:
        return build_detection_test_loader(cfg, name, mapper=mapper)
    batch_size = 1
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        mapper, batch_size = ClassificationMapper(cfg, is_train=False), cfg.TEST.IMS_PER_PROCESS
    return build_detection_test_loader(
        dataset,
        mapper=NamedErrors(mapper or DatasetMapper(cfg, is_train=False)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        batch_size=batch_size,
    )


class Evaluator:
    """Evaluates models on every data set of DATASETS.TEST, over all processes.

    The data sets and their ground truth are read once: the first evaluation loads them, unless
    :meth:`load` has, and later ones find them in memory.

    Args:
        cfg: the config.
        guard: is asked before results.json is written.
        classes: names of the model's classes, in order, by which a data set that has some of them
            is matched; None where nothing tells them.
    """

    def __init__(
        self,
        cfg: CfgNode,
        guard: WriteGuard = NO_GUARD,
        classes: Sequence[str] | None = None,
    ):
        self.cfg = cfg
        self.guard = guard
        self.classes = classes
        self._datasets: dict[str, Records | DatasetFromList] = {}
        self._evaluators: dict[tuple[str, str], DatasetEvaluator] = {}

    def load(self) -> None:
        """Loads the data sets; all processes call it together.

        Raises:
            UserError: if one cannot be loaded.
        """
        for name in self.cfg.DATASETS.TEST:
            if name not in self._datasets:
                dicts = load_dataset_dicts(self.cfg, [name], train=False)
                shared = isinstance(dicts, Records)
                self._datasets[name] = dicts if shared else DatasetFromList(dicts, copy=False)

    def evaluate(
        self,
        model: nn.Module,
        *,
        iteration: int | None = None,
        weights: str | None = None,
        tta: bool = False,
    ) -> dict[str, dict]:
        """Evaluates a model; prints and records the results.

        Args:
            model: takes Detectron2's inputs.
            iteration: the last one that trained it, for results.json.
            weights: the file it comes from, for results.json; None in training.
            tta: evaluate also with test-time augmentation, as tasks that end with ``_TTA``.

        Returns:
            On the main process the metrics by task (by data set and task, if there are several
            data sets), otherwise an empty dict.
        """
        _share_buffers(model)
        self.load()
        results = {}
        for name in self.cfg.DATASETS.TEST:
            metrics = self._inference(self.cfg, model, name)
            if tta:
                metrics = {**metrics, **self._inference_tta(model, name)}
            if comm.is_main_process():
                if metrics:
                    logger.info(f"Results:\n\n{markdown_tables(name, metrics)}\n")
                results[name] = metrics
        if comm.is_main_process():
            self._record(results, iteration, weights)
        if len(results) == 1:
            (results,) = results.values()
        if comm.is_main_process():
            verify_results(self.cfg, results)
        return results

    def _inference(
        self, cfg: CfgNode, model: nn.Module, name: str, mapper: Callable | None = None
    ) -> dict:
        loader = _build_test_loader(cfg, name, self._datasets[name], mapper)
        key = name, cfg.OUTPUT_DIR
        if key not in self._evaluators:
            self._evaluators[key] = share_classes(
                build_evaluator(cfg, name), name, self.classes, dataset_class_names(cfg, [name])
            )
        with autocast(cfg):
            return inference_on_dataset(model, loader, self._evaluators[key]) or {}

    def _inference_tta(self, model: nn.Module, name: str) -> dict:
        """The same with test-time augmentation; its predictions go into a folder of their own."""
        logger.info("Evaluating with test-time augmentation")
        cfg = self.cfg.clone()
        model = tta_class(cfg.MODEL.META_ARCHITECTURE)(cfg, model).train(model.training)
        # Views are made of the images as they are on the disk, each by one resizing.
        mapper = DatasetMapper(cfg, is_train=False, augmentations=[])
        cfg.defrost()
        cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR, "tta"))
        results = self._inference(cfg, model, name, mapper)
        return {f"{task}_TTA": metrics for task, metrics in results.items()}

    def _record(self, results: dict[str, dict], iteration: int | None, weights: str | None) -> None:
        given = {name: metrics for name, metrics in results.items() if metrics}
        if given:
            ema = self.cfg.SOLVER.EMA.ENABLED
            folder = self.cfg.OUTPUT_DIR
            record_results(
                folder, given, iteration=iteration, weights=weights, ema=ema, guard=self.guard
            )
