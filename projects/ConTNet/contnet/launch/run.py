"""Trains or evaluates in each process of a run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.metadata import describe_model
from contnet.data.datasets.classes import dataset_class_names
from contnet.data.datasets.register import register_datasets
from contnet.engine.hooks import LauncherHook
from contnet.engine.resume import trainer_state
from contnet.engine.resume_file import last_name, make_last
from contnet.engine.trainer import Trainer
from contnet.evaluation.evaluate import Evaluator
from contnet.launch.arguments import RunSettings
from contnet.launch.failures import report_lost_lines, shorten_tracebacks
from contnet.launch.precision import set_float32_precision
from contnet.launch.run_lease import LeaseLost, RunLease
from contnet.modeling.build import build_model
from contnet.modeling.compat import silence_known_warnings
from contnet.utils.errors import UserError
from contnet.utils.failures import explain_failure
from contnet.utils.files import NO_GUARD, WriteGuard, atomic_write, explaining_disk
from contnet.utils.logs import protect_handler
from contnet.utils.processes import raise_open_files

__all__ = ["run"]

logger = logging.getLogger(__name__)


def _setup_loggers(folder: str) -> None:
    """Makes all libraries log to the screen and to log.txt; only terminals get colours."""
    rank = comm.get_rank()
    loggers = [
        setup_logger(folder, distributed_rank=rank, name="fvcore"),
        setup_logger(folder, distributed_rank=rank),
        setup_logger(folder, distributed_rank=rank, name="contnet"),
    ]
    shorten_tracebacks()
    for handler in (handler for each in loggers for handler in each.handlers):
        protect_handler(handler)
        if isinstance(handler, logging.StreamHandler):
            report_lost_lines(handler)


def _log_start(cfg: CfgNode, settings: RunSettings) -> None:
    """Logs the environment, the settings and the config of the run."""
    rank, size = comm.get_rank(), comm.get_world_size()
    logger.info(f"Rank of current process: {rank}. World size: {size}")
    logger.info(f"Environment info:\n{collect_env_info()}")
    logger.info(f"Command line arguments: {settings}")
    if comm.is_main_process():
        logger.info(f"Running with full config:\n{cfg.dump()}")
    for note in settings.notes:
        logger.info(note)
    for warning in settings.warnings:
        logger.warning(warning)
    if "naiveSyncBN" in cfg.dump():
        logger.info("SyncBN requires GPUs: Detectron2's naiveSyncBN is used instead")


def _save_config(cfg: CfgNode, eval_only: bool, guard: WriteGuard) -> None:
    """Writes config.yaml; an evaluation does not replace that of a training."""
    path = Path(cfg.OUTPUT_DIR, "config.yaml")
    if comm.is_main_process() and not (eval_only and path.exists()):
        with atomic_write(path, "w", guard) as file:
            file.write(cfg.dump())


def _setup(settings: RunSettings, guard: WriteGuard) -> CfgNode:
    """Prepares this process; returns the config, with a seed."""
    silence_known_warnings()
    cfg = settings.cfg
    register_datasets(cfg)  # a spawned process has not registered them yet
    if cfg.SEED < 0:
        # Not earlier, because the processes must be connected to agree on a seed.
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SEED = comm.shared_random_seed()
        cfg.freeze()
    _setup_loggers(cfg.OUTPUT_DIR)
    _log_start(cfg, settings)
    # Detectron2's default_setup is not used, since it truncates config.yaml if the disk is full.
    _save_config(cfg, settings.eval_only, guard)
    if cfg.DATALOADER.NUM_WORKERS:
        raise_open_files()  # each tensor that a worker sends is an open file
    seed_all_rng(cfg.SEED + comm.get_rank())
    if precision := cfg.SOLVER.FLOAT32_PRECISION:
        set_float32_precision(precision)
        logger.info(f"GPUs compute products and convolutions of float32 tensors in {precision}")
    if not settings.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    return cfg


def _check_agreement(checkpoint: str) -> None:
    """Raises UserError unless all processes resume from the same file."""
    found = comm.all_gather(checkpoint)
    if others := [each for each in found if each != found[0]]:
        raise UserError(
            f"processes would resume from different checkpoints ({found[0] or 'none'}, "
            f"{others[0] or 'none'}): OUTPUT_DIR must be one folder that all machines can read"
        )


def _begin(settings: RunSettings, guard: WriteGuard) -> CfgNode:
    """Prepares this process, and checks the checkpoint of all processes; returns the config."""
    cfg = _setup(settings, guard)
    _check_agreement(settings.checkpoint.path)
    for warning in settings.checkpoint.warnings:
        logger.warning(warning)
    return cfg


def _evaluate_only(cfg: CfgNode, settings: RunSettings, launcher: LauncherHook) -> dict:
    warnings = [*settings.warnings, *settings.checkpoint.warnings]
    model = build_model(cfg)
    launcher.watch(model)
    evaluator = Evaluator(cfg, launcher.guard, warnings=warnings)
    evaluator.prepare()
    metadata = describe_model(cfg, dataset_class_names(cfg, cfg.DATASETS.TEST))
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, metadata=metadata)
    file = settings.checkpoint.path or cfg.MODEL.WEIGHTS
    rest = checkpointer.load(file, ema=cfg.SOLVER.EMA.ENABLED, subset=True)
    evaluator.classes = checkpointer.file_classes
    state = trainer_state(rest)
    first_weights = state.get("weights_warnings", ())
    evaluator.warnings = [*warnings, *checkpointer.warnings, *first_weights]
    return evaluator.evaluate(
        model, iteration=state.get("iteration"), weights=file, tta=cfg.TEST.AUG.ENABLED
    )


def _check_unchanged(settings: RunSettings) -> None:
    """Raises UserError if another training has saved into the folder since this one started."""
    folder = settings.cfg.OUTPUT_DIR
    last = last_name(folder)
    if last != settings.checkpoint.last:
        raise UserError(
            f"another training has saved {last or 'nothing'} into {folder} since this one was "
            "started: restart it with --resume"
        )


def _take_lease(settings: RunSettings) -> RunLease:
    """Takes the lease of OUTPUT_DIR on rank 0, while the other ranks wait; returns it."""
    lease = RunLease.of(settings.cfg.OUTPUT_DIR, settings.processes.environment)
    refused = ""
    if comm.is_main_process():
        try:
            lease.take()
            _check_unchanged(settings)
        except (UserError, LeaseLost) as error:
            refused = str(error)
    if refused := comm.all_gather(refused)[0]:
        if comm.is_main_process():
            raise UserError(refused)
        sys.exit(1)
    return lease


def _train(cfg: CfgNode, settings: RunSettings, launcher: LauncherHook) -> dict:
    checkpoint = settings.checkpoint
    if settings.resume and not checkpoint.path:
        logger.warning(
            f"--resume finds no checkpoint in {cfg.OUTPUT_DIR}: starting from MODEL.WEIGHTS"
            f" {cfg.MODEL.WEIGHTS or '(empty)'}"
        )
    trainer = Trainer(cfg, cfg.SEED, launcher, settings.scaled, settings.warnings)
    trainer.resume_or_load(checkpoint.path)
    if checkpoint.path and comm.is_main_process():
        earlier = make_last(cfg.OUTPUT_DIR, checkpoint.path, launcher.guard)
        trainer.checkpointer.earlier = earlier
    return trainer.fit()


def run(settings: RunSettings, launcher: LauncherHook | None = None) -> dict:
    """Trains or evaluates in one process of a run; returns the last evaluation's metrics.

    A training takes the lease of its folder, unless the launcher already has a guard.

    Args:
        settings: the same in all processes.
        launcher: hook of the launcher of this process; None if it has none.

    Raises:
        UserError: if another training writes into the folder, and for other known errors.
    """
    try:
        with explaining_disk(settings.cfg.OUTPUT_DIR):
            return _run(settings, launcher or LauncherHook())
    except Exception as error:  # workers may die, and memory may run out, anywhere
        if (reason := explain_failure(error)) is None:
            raise
        raise UserError(reason) from error


def _run(settings: RunSettings, launcher: LauncherHook) -> dict:
    if settings.eval_only:
        return _evaluate_only(_begin(settings, launcher.guard), settings, launcher)
    if launcher.guard is not NO_GUARD:
        return _train(_begin(settings, launcher.guard), settings, launcher)
    launcher.guard = lease = _take_lease(settings)
    try:
        return _train(_begin(settings, launcher.guard), settings, launcher)
    except LeaseLost as error:
        raise UserError(f"{error}: this one ends") from error
    finally:
        lease.release()
