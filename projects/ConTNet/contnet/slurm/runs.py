"""The runs of a submission, read and checked before anything is written."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer

from contnet.checkpoint.names import FINAL, has_last_checkpoint, last_checkpoint
from contnet.checkpoint.reading import read_weights
from contnet.config.nodes import flatten
from contnet.launch.arguments import configure
from contnet.launch.preflight import check_inputs, check_output
from contnet.slurm.describe import describe_run
from contnet.slurm.jobs import check_free
from contnet.slurm.sweep import RunArguments, expand_runs
from contnet.utils.errors import UserError

__all__ = ["Run", "prepare_runs"]


@dataclass
class Run:
    """A run of a submission: what was asked for, its whole config, and its folder.

    ``finished`` is whether there is nothing left to do: it is to be resumed, and has trained all of
    its iterations.
    """

    arguments: RunArguments
    cfg: CfgNode
    folder: Path
    finished: bool = False


def _base_folder(args: argparse.Namespace, runs: Sequence[RunArguments], cfg: CfgNode) -> Path:
    """OUTPUT_DIR of a run alone; of an array, the folder that its runs' folders lie in."""
    if (len(runs) == 1 and not runs[0].name) or "OUTPUT_DIR" in args.opts[::2]:
        return Path(cfg.OUTPUT_DIR).expanduser().absolute()
    if args.array:
        return Path("output", Path(args.array).stem).absolute()
    return Path(f"{cfg.OUTPUT_DIR}_sweep").expanduser().absolute()


@contextlib.contextmanager
def _temporary_datasets():
    """Forgets the data sets that are registered within, whose names other runs may use anew."""
    before = set(DatasetCatalog.list())
    try:
        yield
    finally:
        for name in set(DatasetCatalog.list()) - before:
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name)


def _check_content(cfg: CfgNode, arguments: RunArguments, processes: int, seen: set) -> None:
    """The checks of train_net.py; of what runs have in common, the data sets, once."""
    relevant = cfg.clone()
    relevant.OUTPUT_DIR = relevant.MODEL.WEIGHTS = ""
    for key in ("BASE_LR", "MAX_ITER", "STEPS", "WEIGHT_DECAY", "WARMUP_ITERS"):
        relevant.SOLVER.pop(key)
    relevant.SEED = 0
    key = (relevant.dump(), arguments.eval_only)
    check_inputs(cfg, argparse.Namespace(**asdict(arguments)), processes, data=key not in seen)
    seen.add(key)


def _check_same_settings(cfg: CfgNode) -> None:
    """Refuses to go on with a run of a sweep that had other settings; a longer one is fine."""
    folder = Path(cfg.OUTPUT_DIR)
    file = folder / "config.yaml"
    if not file.exists() or not has_last_checkpoint(folder):
        return
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read ({error}): move {folder} away") from error
    before = dict(flatten(content if isinstance(content, dict) else {}, cfg))
    now = dict(flatten(yaml.safe_load(cfg.dump()), cfg))
    changed = [key for key in {**now, **before} if now.get(key) != before.get(key)]
    if changed := [key for key in changed if key not in ("SEED", "SOLVER.MAX_ITER")]:
        raise UserError(
            f"{folder} has a training with other settings ({', '.join(changed[:3])}): choose "
            "another OUTPUT_DIR, or remove it"
        )


def _has_finished(cfg: CfgNode, arguments: RunArguments) -> bool:
    folder = Path(cfg.OUTPUT_DIR)
    if not arguments.resume or arguments.eval_only or not has_last_checkpoint(folder):
        return False
    file = last_checkpoint(folder)
    if file.stem != FINAL or not file.exists() or describe_run(folder) != "finished":
        return False
    # MAX_ITER may have been raised since.
    trainer = read_weights(str(file)).rest.get("trainer")
    return isinstance(trainer, dict) and trainer.get("iteration", -1) + 1 >= cfg.SOLVER.MAX_ITER


def prepare_runs(args: argparse.Namespace) -> tuple[Path, list[Run]]:
    """Reads and checks every run; nothing is written."""
    expanded = expand_runs(args)
    processes = args.num_gpus * args.num_machines
    base, runs, seen = None, [], set()
    for number, arguments in enumerate(expanded, 1):
        try:
            with _temporary_datasets():
                copy = argparse.Namespace(**asdict(arguments), notes=())
                cfg = DefaultTrainer.auto_scale_workers(configure(copy), processes)
                base = base or _base_folder(args, expanded, cfg)
                cfg.OUTPUT_DIR = str(base / arguments.name)
                weights = cfg.MODEL.WEIGHTS
                if weights and "://" not in weights:
                    cfg.MODEL.WEIGHTS = os.path.abspath(os.path.expanduser(weights))
                for note in copy.notes:
                    print(note)
                if arguments.name and arguments.resume and not arguments.eval_only:
                    _check_same_settings(cfg)
                _check_content(cfg, arguments, processes, seen)
                check_free(cfg.OUTPUT_DIR)
                check_output(cfg, argparse.Namespace(**asdict(arguments)), make=False)
                finished = _has_finished(cfg, arguments)
        except UserError as error:
            if not arguments.name:
                raise
            which = f"run {number} of {len(expanded)} ({arguments.name})"
            raise UserError(f"{which}: {error}") from error
        runs.append(Run(arguments, cfg, Path(cfg.OUTPUT_DIR), finished))
    return base, runs
