"""What each process of a run does: it trains, or evaluates."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.metadata import describe_model
from contnet.checkpoint.names import has_last_checkpoint
from contnet.data.datasets.classes import dataset_class_names
from contnet.data.datasets.register import register_datasets
from contnet.engine.hooks import LauncherHook
from contnet.engine.resume import trainer_state
from contnet.engine.trainer import Trainer
from contnet.evaluation.evaluate import Evaluator
from contnet.launch.arguments import RunSettings, weights_to_evaluate
from contnet.modeling.build import build_model
from contnet.modeling.compat import silence_known_warnings
from contnet.utils.logs import WithoutColours

__all__ = ["run"]

logger = logging.getLogger(__name__)


def _setup_loggers(folder: str) -> None:
    """Has all libraries write to the screen and into log.txt, there without colours."""
    rank = comm.get_rank()
    # The first two as default_setup has them, which then finds them there.
    loggers = [
        setup_logger(folder, distributed_rank=rank, name="fvcore"),
        setup_logger(folder, distributed_rank=rank),
        setup_logger(folder, distributed_rank=rank, name="contnet"),
    ]
    for handler in (handler for each in loggers for handler in each.handlers):
        if isinstance(handler, logging.StreamHandler) and not handler.stream.isatty():
            handler.setFormatter(WithoutColours(handler.formatter))


def _setup(settings: RunSettings) -> CfgNode:
    """Makes this process ready; the config, with a seed."""
    silence_known_warnings()
    cfg = settings.cfg
    register_datasets(cfg)  # a process that was started for the run has read no config
    if cfg.SEED < 0:
        # Not before: processes that a launcher has started on several machines agree on it here.
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SEED = comm.shared_random_seed()
        cfg.freeze()
    _setup_loggers(cfg.OUTPUT_DIR)
    default_setup(cfg, settings)
    for note in settings.notes:
        logger.info(note)
    for warning in settings.warnings:
        logger.warning(warning)
    if "naiveSyncBN" in cfg.dump():
        logger.info("Norms over all processes are computed by naiveSyncBN: SyncBN needs GPUs")
    return cfg


def _evaluate_only(
    cfg: CfgNode, resume: bool, launcher: LauncherHook, warnings: Sequence[str]
) -> dict:
    model = build_model(cfg)
    launcher.watch(model)
    evaluator = Evaluator(cfg, launcher.guard, warnings=warnings)
    evaluator.prepare()
    metadata = describe_model(cfg, dataset_class_names(cfg, cfg.DATASETS.TEST))
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, metadata=metadata)
    file = weights_to_evaluate(cfg, resume)
    rest = checkpointer.load(file, ema=cfg.SOLVER.EMA.ENABLED, subset=True)
    evaluator.classes = checkpointer.file_classes
    state = trainer_state(rest)
    first_weights = state.get("weights_warnings", ())
    evaluator.warnings = [*warnings, *checkpointer.warnings, *first_weights]
    return evaluator.evaluate(
        model, iteration=state.get("iteration"), weights=file, tta=cfg.TEST.AUG.ENABLED
    )


def run(settings: RunSettings, launcher: LauncherHook | None = None) -> dict:
    """Trains or evaluates in one process of a run; returns the last evaluation's metrics.

    Args:
        settings: the same in all processes.
        launcher: what the launcher of this process adds.
    """
    launcher = launcher or LauncherHook()
    cfg = _setup(settings)
    if settings.eval_only:
        return _evaluate_only(cfg, settings.resume, launcher, settings.warnings)
    if settings.resume and not has_last_checkpoint(cfg.OUTPUT_DIR):
        logger.warning(
            f"--resume finds no checkpoint in {cfg.OUTPUT_DIR}: starting from MODEL.WEIGHTS"
            f" {cfg.MODEL.WEIGHTS or '(empty)'}"
        )
    trainer = Trainer(cfg, cfg.SEED, launcher, settings.scaled, settings.warnings)
    trainer.resume_or_load(settings.resume)
    return trainer.fit()
