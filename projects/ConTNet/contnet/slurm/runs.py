"""The runs of a submission, read and checked before anything is written."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from contnet.checkpoint.names import FINAL
from contnet.checkpoint.reading import read_checkpoint
from contnet.engine.resume import Before, differing_keys, resumed_iteration, trainer_state
from contnet.engine.resume_file import ResumeFile, choose_checkpoint
from contnet.launch.arguments import RunSettings, configure
from contnet.launch.environment import DistributedEnvironment, Processes
from contnet.launch.preflight import (
    check_inputs,
    check_output,
    resume_settings,
)
from contnet.launch.run_lease import RunLease
from contnet.slurm.describe import describe_run
from contnet.slurm.jobs import check_free
from contnet.slurm.sweep import RunArguments, expand_runs
from contnet.utils.errors import UserError
from contnet.utils.text import say

__all__ = ["Run", "prepare_runs"]

# Keys that may change when a run of a sweep is resumed.
_MAY_DIFFER = ("OUTPUT_DIR", "SEED", "SOLVER.MAX_ITER")


@dataclass
class Run:
    """A run of a submission.

    Attributes:
        arguments: arguments of the run, as given.
        settings: settings of the run, with the finished config.
        folder: OUTPUT_DIR.
        finished: nothing is left to do: the run is to be resumed, but has done all its iterations.
    """

    arguments: RunArguments
    settings: RunSettings
    folder: Path
    finished: bool = False

    @property
    def cfg(self) -> CfgNode:
        """The finished config."""
        return self.settings.cfg


def _base_folder(args: argparse.Namespace, runs: Sequence[RunArguments], cfg: CfgNode) -> Path:
    """Returns OUTPUT_DIR of a single run, or the folder that contains those of an array."""
    if (len(runs) == 1 and not runs[0].name) or "OUTPUT_DIR" in args.opts[::2]:
        return Path(cfg.OUTPUT_DIR).expanduser().absolute()
    if args.array:
        return Path("output", Path(args.array).stem).absolute()
    return Path(f"{cfg.OUTPUT_DIR}_sweep").expanduser().absolute()


@contextlib.contextmanager
def _temporary_datasets():
    """Context that forgets the data sets registered in it: other runs may use their names."""
    before = set(DatasetCatalog.list())
    try:
        yield
    finally:
        for name in set(DatasetCatalog.list()) - before:
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name)


def _check_content(settings: RunSettings, seen: set) -> None:
    """Runs the checks of train_net.py; checks data sets that runs share only once."""
    relevant = settings.cfg.clone()
    relevant.defrost()
    relevant.OUTPUT_DIR = ""
    if not settings.eval_only:  # where the weights determine the classes
        relevant.MODEL.WEIGHTS = ""
    for key in ("BASE_LR", "MAX_ITER", "STEPS", "WEIGHT_DECAY", "WARMUP_ITERS"):
        relevant.SOLVER.pop(key)
    relevant.SEED = 0
    key = (relevant.dump(), settings.eval_only)
    check_inputs(settings, data=key not in seen)
    seen.add(key)


def _check_same_settings(run: Run) -> None:
    """Raises UserError if a run of a sweep would resume with other settings than before."""
    cfg, file = run.cfg, run.settings.checkpoint.path
    if not file:
        return
    before = Before.of(file, read_checkpoint(file), cfg)
    changed = [key for key in differing_keys(before, cfg) if key not in _MAY_DIFFER]
    if changed:
        raise UserError(
            f"{run.folder} has a training with other settings ({', '.join(changed[:3])}): choose "
            "another OUTPUT_DIR, or remove it"
        )


def _has_finished(run: Run, cfg: CfgNode) -> bool:
    """Whether a run that is resumed with ``cfg`` has nothing left to do."""
    file = run.settings.checkpoint.path
    if run.settings.eval_only or Path(file).stem != FINAL:
        return False
    if describe_run(run.folder) != "finished":
        return False
    # MAX_ITER may have been raised since, and the batch size changed.
    content = read_checkpoint(file)
    state = trainer_state(content)
    before, iterations = Before.of(file, content, cfg), state.get("iteration", -1) + 1
    if before.batch not in (0, cfg.SOLVER.IMS_PER_BATCH):
        images = (state.get("stream") or {}).get("images_seen", iterations * before.batch)
        iterations = resumed_iteration(images, iterations, before, cfg)
    return iterations >= cfg.SOLVER.MAX_ITER


def _make_run(
    arguments: RunArguments,
    cfg: CfgNode,
    notes: list[str],
    folder: Path,
    processes: Processes,
    resume_from: str,
) -> Run:
    """Returns a run with absolute paths, which are valid in the job, too."""
    for note in notes:
        say(note)
    cfg.OUTPUT_DIR = str(folder)
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights:
        cfg.MODEL.WEIGHTS = os.path.abspath(os.path.expanduser(weights))
    cfg.freeze()
    checkpoint = ResumeFile()
    if arguments.resume:  # the job verifies its tensors
        checkpoint = choose_checkpoint(folder, resume_from, tensors=bool(resume_from))
    settings = RunSettings(
        cfg,
        arguments.resume,
        arguments.eval_only,
        processes,
        notes=tuple(notes),
        checkpoint=checkpoint,
    )
    return Run(arguments, settings, folder)


def _check(run: Run, seen: set) -> CfgNode:
    """Checks a run on this machine; returns the config that it starts or resumes with."""
    settings = run.settings
    check_free(run.folder)
    # Also for an evaluation: its job takes the lease, by which --status finds it.
    RunLease.of(run.folder, settings.processes.environment).check_free()
    if run.arguments.name and settings.resume and not settings.eval_only:
        _check_same_settings(run)
    _check_content(settings, seen)
    check_output(settings, make=False)
    return resume_settings(settings, data=False).cfg


def prepare_runs(args: argparse.Namespace) -> tuple[Path, list[Run]]:
    """Reads, completes and checks the config of every run; nothing is written.

    Args:
        args: arguments from :func:`contnet.slurm.submit.parse_submission`.

    Returns:
        The folder of the run, or the one that contains the runs of an array; and the runs.
    """
    expanded = expand_runs(args)
    # The job's processes, however this process was started.
    processes = Processes(args.num_gpus, args.num_machines, environment=DistributedEnvironment())
    base, runs, seen = None, [], set()
    for number, arguments in enumerate(expanded, 1):
        try:
            with _temporary_datasets():
                cfg, notes = configure(
                    arguments.config_file,
                    arguments.opts,
                    arguments.eval_only,
                    processes.world_size,
                    arguments.resume,
                )
                base = base or _base_folder(args, expanded, cfg)
                run = _make_run(
                    arguments, cfg, notes, base / arguments.name, processes, args.resume_from
                )
                cfg = _check(run, seen)
                run.finished = _has_finished(run, cfg)
        except UserError as error:
            if not arguments.name:
                raise
            which = f"run {number} of {len(expanded)} ({arguments.name})"
            raise type(error)(f"{which}: {error}") from error
        runs.append(run)
    return base, runs
