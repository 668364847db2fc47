"""Evaluates a model on the config's test sets."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_test_loader
from detectron2.evaluation import (
    DatasetEvaluator,
    inference_context,
    inference_on_dataset,
    verify_results,
)
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from contnet.data.datasets.classes import dataset_class_names
from contnet.data.datasets.shards import sample_name
from contnet.data.findings import SHOWN
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.images import read_pixels
from contnet.data.pipeline.loader import build_collator, init_worker, pins_memory
from contnet.data.pipeline.mappers import ClassificationMapper, Mapper, NamedErrors
from contnet.data.pipeline.records import Records
from contnet.data.validation.dataset import has_truth
from contnet.evaluation.build import build_evaluator
from contnet.evaluation.drawing import draw_prediction
from contnet.evaluation.plain_outputs import plain_output
from contnet.evaluation.protocol import dataset_digest, describe_protocol
from contnet.evaluation.results import markdown_tables, record_results
from contnet.evaluation.subset import share_classes
from contnet.evaluation.unreadable import (
    CollateReadable,
    MarkUnreadable,
    ReadableBatches,
    is_readable,
)
from contnet.evaluation.validation_loss import build_loss_mapper, mean_losses
from contnet.modeling.amp import autocast
from contnet.modeling.tta import tta_class
from contnet.utils.files import NO_GUARD, WriteGuard
from contnet.utils.text import printable

__all__ = ["Evaluator"]

_DRAWN = 4  # number of images
_DRAWN_SCORE = 0.3

logger = logging.getLogger(__name__)


def _share_buffers(model: nn.Module) -> None:
    """Copies rank 0's running statistics, which checkpoints contain, to all processes."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def _build_mapper(cfg: CfgNode, mapper: Callable | None = None) -> Callable:
    """Builds the mapper of an evaluation, or wraps the given one; applies TEST.SKIP_UNREADABLE."""
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        mapper = ClassificationMapper(cfg, is_train=False)
    mapper = NamedErrors(mapper or Mapper(cfg, is_train=False))
    return MarkUnreadable(mapper) if cfg.TEST.SKIP_UNREADABLE else mapper


def _printable_names(metrics: dict) -> dict:
    """Makes class names in metrics printable, for terminals, TensorBoard and JSON."""
    return {
        task: {printable(name): value for name, value in values.items()}
        if isinstance(values, dict)
        else values
        for task, values in metrics.items()
    }


def _build_test_loader(
    cfg: CfgNode, dataset: Records | DatasetFromList, mapper: Callable | None
) -> DataLoader:
    mapper = _build_mapper(cfg, mapper)
    classifier = cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"
    loader = build_detection_test_loader(
        dataset,
        mapper=mapper,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        batch_size=cfg.TEST.IMS_PER_PROCESS if classifier else 1,
        collate_fn=CollateReadable(build_collator(cfg)),
    )
    # Detectron2's function has no arguments for these.
    loader.worker_init_fn = init_worker
    loader.pin_memory = pins_memory(cfg)
    return loader


class _Guarded(DatasetEvaluator):
    """An evaluator that may only finish, and write its files, if the guard allows it.

    Args:
        evaluator: evaluator of the data set.
        guard: checked on the main process, which writes.
    """

    def __init__(self, evaluator: DatasetEvaluator, guard: WriteGuard):
        self.evaluator = evaluator
        self.guard = guard

    def reset(self) -> None:
        self.evaluator.reset()

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        self.evaluator.process(inputs, outputs)

    def evaluate(self) -> dict | None:
        if comm.is_main_process():
            self.guard.check()
        return self.evaluator.evaluate()


@dataclass
class _Outcome:
    """The result of one data set; empty except on the main process.

    Attributes:
        metrics: metrics by task.
        skipped: files of images that could not be read.
        warnings: warnings that concern the metrics, one line each.
    """

    metrics: dict
    skipped: list[str]
    warnings: list[str]


class Evaluator:
    """Evaluates models on every data set of DATASETS.TEST, over all processes.

    The data sets and their ground truth are read once, by :meth:`prepare` or the first evaluation,
    and kept in memory.

    Args:
        cfg: the config.
        guard: called before predictions and results.json are written.
        classes: names of the model's classes, in order, to match data sets with some of the
            classes; None if they are unknown.
        warnings: warnings that concern all evaluations, one line each, for results.json.
    """

    def __init__(
        self,
        cfg: CfgNode,
        guard: WriteGuard = NO_GUARD,
        classes: Sequence[str] | None = None,
        warnings: Sequence[str] = (),
    ):
        self.cfg = cfg
        self.guard = guard
        self.classes = classes
        self.warnings = warnings
        self._datasets: dict[str, Records | DatasetFromList] = {}
        self._digests: dict[str, str] = {}
        self._with_truth: list[str] | None = None
        self._evaluators: dict[tuple[str, str], DatasetEvaluator] = {}

    def prepare(self) -> None:
        """Checks that an evaluation is possible; all processes must call it.

        Raises:
            UserError: if a data set or its first image cannot be loaded, or its evaluator cannot
                be built.
        """
        self._load()
        for name in self.cfg.DATASETS.TEST:
            self._evaluator(self.cfg, name)
            if comm.is_main_process() and len(self._datasets[name]):
                _build_mapper(self.cfg)(self._datasets[name][0])

    def _evaluator(self, cfg: CfgNode, name: str) -> DatasetEvaluator:
        key = name, cfg.OUTPUT_DIR
        if key not in self._evaluators:
            self._evaluators[key] = build_evaluator(cfg, name)
        return self._evaluators[key]

    def _load(self) -> None:
        for name in self.cfg.DATASETS.TEST:
            if name not in self._datasets:
                dicts = load_dataset_dicts(self.cfg, [name], train=False)
                shared = isinstance(dicts, Records)
                self._datasets[name] = dicts if shared else DatasetFromList(dicts, copy=False)

    def evaluate(
        self,
        model: nn.Module,
        *,
        tta: bool = False,
        iteration: int | None = None,
        weights: str | None = None,
        **facts,
    ) -> dict[str, dict]:
        """Evaluates a model; prints and records the results.

        Args:
            model: a model with Detectron2's inputs.
            tta: also evaluate with test-time augmentation; its tasks end with ``_TTA``.
            iteration: the last iteration of its training, for results.json.
            weights: file of its weights, for results.json; None in training.
            **facts: facts of a training for results.json, as in :func:`record_results`.

        Returns:
            On the main process the metrics by task (by data set and task, if there are several
            data sets), otherwise an empty dict.
        """
        _share_buffers(model)
        self._load()
        outcomes = {}
        for name in self.cfg.DATASETS.TEST:
            outcome = self._inference(self.cfg, model, name)
            if tta:
                outcome.metrics |= self._inference_tta(model, name)
            if comm.is_main_process():
                outcomes[name] = outcome
                if outcome.metrics:
                    logger.info(f"Results:\n\n{markdown_tables(name, outcome.metrics)}\n")
        if comm.is_main_process():
            self._record(outcomes, iteration=iteration, weights=weights, **facts)
        results = {name: outcome.metrics for name, outcome in outcomes.items()}
        if len(results) == 1:
            (results,) = results.values()
        if comm.is_main_process():
            verify_results(self.cfg, results)
        return results

    def losses(self, model: nn.Module) -> dict[str, float]:
        """Computes mean losses on the test sets with ground truth, the same on all processes.

        Args:
            model: a model with Detectron2's inputs; it is not changed.

        Returns:
            Losses by the names of metrics.json, such as ``validation/total_loss``, with the data
            set's name as a prefix if there are several.
        """
        _share_buffers(model)
        self._load()
        if self._with_truth is None:  # once, because it reads the annotation files
            tests = self.cfg.DATASETS.TEST
            self._with_truth = [name for name in tests if has_truth(self.cfg, name)]
        losses = {}
        for name in self._with_truth:
            loader = _build_test_loader(self.cfg, self._datasets[name], build_loss_mapper(self.cfg))
            prefix = f"{name}/" if len(self.cfg.DATASETS.TEST) > 1 else ""
            with autocast(self.cfg):
                means = mean_losses(self.cfg, model, ReadableBatches(self.cfg, loader))
            losses |= {f"{prefix}validation/{key}": value for key, value in means.items()}
        return losses

    def draw_predictions(self, model: nn.Module) -> dict[str, np.ndarray]:
        """Draws predictions on the first images of the first test set, on this process.

        Args:
            model: a model with Detectron2's inputs.

        Returns:
            Drawn images by file name, uint8 RGB (H, W, 3); none if the data set's classes have
            no names.
        """
        self._load()
        name, cfg = self.cfg.DATASETS.TEST[0], self.cfg
        names = self.classes or dataset_class_names(cfg, [name])
        mapper, pictures = _build_mapper(cfg), {}
        for record in itertools.islice(self._datasets[name], _DRAWN if names else 0):
            image = mapper(record)
            if not is_readable(image):
                continue
            with inference_context(model), torch.no_grad(), autocast(cfg):
                (output,) = model([image])
            pixels = read_pixels(record, "RGB", cfg.INPUT.MAX_PIXELS)
            prediction = plain_output(output, names, _DRAWN_SCORE)
            pictures[Path(sample_name(record)).name] = draw_prediction(pixels, prediction, names)
        return pictures

    def _inference(
        self, cfg: CfgNode, model: nn.Module, name: str, mapper: Callable | None = None
    ) -> _Outcome:
        evaluator = self._evaluator(cfg, name)
        loader = _build_test_loader(cfg, self._datasets[name], mapper)
        loader = ReadableBatches(cfg, loader, evaluator)
        with autocast(cfg):
            shared = share_classes(evaluator, name, self.classes, dataset_class_names(cfg, [name]))
            guarded = _Guarded(shared, self.guard)
            metrics = _printable_names(inference_on_dataset(model, loader, guarded) or {})
        skipped = [file for part in comm.gather(loader.skipped) for file in part]
        warnings = list(getattr(evaluator, "warnings", ()))
        if skipped:
            files = ", ".join(skipped[:SHOWN]) + (", ..." if len(skipped) > SHOWN else "")
            warnings.append(
                f"{name}: {len(skipped)} of {len(self._datasets[name])} images cannot be read, "
                f"and count as missed (TEST.SKIP_UNREADABLE): {files}"
            )
        return _Outcome(metrics, skipped, warnings)

    def _inference_tta(self, model: nn.Module, name: str) -> dict:
        """Evaluates with test-time augmentation; its predictions have their own folder."""
        logger.info("Evaluating with test-time augmentation")
        cfg = self.cfg.clone()
        model = tta_class(cfg.MODEL.META_ARCHITECTURE)(cfg, model).train(model.training)
        # Each view is resized once, from the original image.
        mapper = Mapper(cfg, is_train=False, augmentations=[])
        cfg.defrost()
        cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR, "tta"))
        metrics = self._inference(cfg, model, name, mapper).metrics
        return {f"{task}_TTA": values for task, values in metrics.items()}

    def _record(self, outcomes: dict[str, _Outcome], **facts) -> None:
        given = {name: each for name, each in outcomes.items() if each.metrics or each.warnings}
        for line in dict.fromkeys(line for each in given.values() for line in each.warnings):
            logger.warning(line)
        if given:
            warnings = {name: [*self.warnings, *each.warnings] for name, each in given.items()}
            record_results(
                self.cfg.OUTPUT_DIR,
                {name: each.metrics for name, each in given.items()},
                ema=self.cfg.SOLVER.EMA.ENABLED,
                float32_precision=self.cfg.SOLVER.FLOAT32_PRECISION,
                skipped={name: len(each.skipped) for name, each in given.items()},
                warnings=warnings,
                protocols={name: self._protocol(name, warnings[name]) for name in given},
                guard=self.guard,
                **facts,
            )

    def _protocol(self, name: str, warnings: Sequence[str]) -> dict:
        if name not in self._digests:
            self._digests[name] = dataset_digest(self._datasets[name])
        return describe_protocol(self.cfg, name, self._digests[name], warnings)
