"""What train_net.py does."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.names import has_last_checkpoint
from contnet.data.datasets.classes import dataset_class_names
from contnet.engine.trainer import Trainer
from contnet.evaluation.evaluate import Evaluator
from contnet.launch.arguments import configure, parse_arguments
from contnet.launch.distributed import launch_run
from contnet.launch.preflight import check_run, count_processes
from contnet.modeling.build import build_model
from contnet.modeling.compat import silence_known_warnings
from contnet.utils.errors import UserError, print_error

__all__ = ["main", "run"]

logger = logging.getLogger(__name__)


def _setup(args: argparse.Namespace) -> CfgNode:
    silence_known_warnings()
    cfg = DefaultTrainer.auto_scale_workers(configure(args), comm.get_world_size())
    if cfg.SEED < 0:
        cfg.SEED = comm.shared_random_seed()
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="contnet")
    for note in args.notes:
        logger.info(note)
    if "naiveSyncBN" in cfg.dump():
        logger.info("Norms over all processes are computed by naiveSyncBN: SyncBN needs GPUs")
    return cfg


def _iteration(rest: dict) -> int | None:
    """The last iteration that a checkpoint's weights have seen, if it says so."""
    trainer = rest.get("trainer", rest)
    return trainer.get("iteration") if isinstance(trainer, dict) else None


def _evaluate_only(cfg: CfgNode, resume: bool) -> dict:
    model = build_model(cfg)
    evaluator = Evaluator(cfg)
    evaluator.load()
    classes = dataset_class_names(cfg, cfg.DATASETS.TEST)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, classes=classes)
    file = cfg.MODEL.WEIGHTS
    if resume and checkpointer.has_checkpoint():
        file = checkpointer.get_checkpoint_file()
    rest = checkpointer.load_checkpoint(file)
    if cfg.SOLVER.EMA.ENABLED:
        if "ema" not in rest:
            raise UserError(f"{file} has no EMA weights: set SOLVER.EMA.ENABLED False")
        model.load_state_dict(
            {name.removeprefix("module."): value for name, value in rest["ema"].items()}
        )
    return evaluator.evaluate(
        model, iteration=_iteration(rest), weights=file, tta=cfg.TEST.AUG.ENABLED
    )


def run(
    args: argparse.Namespace, prepare: Callable[[Trainer], None] = lambda trainer: None
) -> dict:
    """Trains or evaluates in one process of a run; returns the last evaluation's metrics.

    Args:
        args: of :func:`contnet.launch.arguments.parse_arguments`.
        prepare: what a launcher adds to the trainer before it starts.
    """
    cfg = _setup(args)
    if args.eval_only:
        return _evaluate_only(cfg, args.resume)
    if args.resume and not has_last_checkpoint(cfg.OUTPUT_DIR):
        logger.warning(
            f"--resume finds no checkpoint in {cfg.OUTPUT_DIR}: starting from MODEL.WEIGHTS"
            f" {cfg.MODEL.WEIGHTS or '(empty)'}"
        )
    trainer = Trainer(cfg, cfg.SEED)
    trainer.resume_or_load(args.resume)
    prepare(trainer)
    return trainer.fit()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of train_net.py.

    Args:
        argv: the command line, this process's own by default.

    Returns:
        The exit status. Mistakes of the user's are one line on the error stream and status 1.
    """
    silence_known_warnings()
    try:
        args = parse_arguments(argv)
        cfg = DefaultTrainer.auto_scale_workers(configure(args), count_processes(args))
        check_run(cfg, args)
        launch_run(run, args, torch.device(cfg.MODEL.DEVICE).type)
    except UserError as error:
        print_error(error)
        return 1
    return 0
