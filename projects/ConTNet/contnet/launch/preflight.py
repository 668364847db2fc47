"""Checks a run before any process starts."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer

from contnet.checkpoint.fetching import fetch_weights
from contnet.checkpoint.metadata import METADATA
from contnet.checkpoint.names import checkpoint_files, has_last_checkpoint
from contnet.checkpoint.reading import read_checkpoint, read_class_names
from contnet.data.datasets.classes import dataset_class_names
from contnet.data.pipeline.annotations import cache_cityscapes, load_dataset_dicts
from contnet.data.pipeline.loader import micro_batch_size
from contnet.data.validation.dataset import Remarks, check_datasets, has_truth
from contnet.engine.resume import Before, refusal, resume_config, trainer_state
from contnet.engine.trackers import check_trackers
from contnet.evaluation.build import check_evaluator
from contnet.evaluation.metrics import check_best_metric
from contnet.launch.arguments import RunSettings
from contnet.launch.environment import Processes
from contnet.launch.gpus import check_device_value, check_gpu_count
from contnet.launch.run_lease import RunLease
from contnet.modeling.pspnet import SEGMENTORS
from contnet.utils.errors import UsageError, UserError
from contnet.utils.files import explain_os_error
from contnet.utils.text import describe_difference

__all__ = [
    "check_device",
    "check_inputs",
    "check_output",
    "check_run",
    "resume_settings",
]

# Number of GPUs that the shipped recipes are made for.
_RECIPE_GPUS = 8


def check_device(cfg: CfgNode, processes: Processes) -> None:
    """Raises UserError unless this machine has the device, and enough GPUs."""
    device = cfg.MODEL.DEVICE
    check_device_value(device, processes.world_size)
    launcher = processes.environment.launcher
    check_gpu_count(device, processes.num_gpus, torch.cuda.device_count(), launcher)


def _writable(folder: Path, make: bool) -> None:
    """Checks that files can be written to a folder, which may not exist yet."""
    if make:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        return
    parent = next(each for each in (folder, *folder.parents) if each.exists())
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_output(settings: RunSettings, make: bool = True) -> None:
    """Checks the output folder.

    Args:
        settings: settings of the run.
        make: whether to create the folder; otherwise, nothing is written.

    Raises:
        UserError: if the folder cannot be written, or contains another run's checkpoints.
    """
    folder = Path(settings.cfg.OUTPUT_DIR)
    try:
        _writable(folder.absolute(), make)
    except OSError as error:
        raise UserError(
            f"OUTPUT_DIR {folder} cannot be written ({explain_os_error(error, folder)}): choose "
            "another"
        ) from error
    if settings.resume or settings.eval_only:
        return
    if has_last_checkpoint(folder) or checkpoint_files(folder):
        raise UserError(
            f"OUTPUT_DIR {folder} already holds checkpoints: add --resume to resume that run, "
            "or choose another OUTPUT_DIR"
        )


def _check_not_in_use(settings: RunSettings) -> None:
    """Raises UserError if another training writes into OUTPUT_DIR; evaluations are not checked.

    Only rank 0's machine checks, because others cannot distinguish its lease from another run's.
    """
    processes = settings.processes
    if processes.environment.rank == processes.machine_rank == 0 and not settings.eval_only:
        RunLease.of(settings.cfg.OUTPUT_DIR, processes.environment).check_free()


def _check_weights(settings: RunSettings) -> None:
    cfg = settings.cfg
    weights = cfg.MODEL.WEIGHTS
    resumes = bool(settings.checkpoint.path)
    if settings.eval_only and not weights and not resumes:
        raise UsageError(
            "--eval-only has no weights to evaluate: add MODEL.WEIGHTS FILE, or --resume for the "
            f"last checkpoint in OUTPUT_DIR {cfg.OUTPUT_DIR}"
        )
    if not weights or resumes:
        return
    if "://" in weights:
        # Only one process per machine downloads missing files.
        if settings.processes.environment.local_rank == 0:
            fetch_weights(weights)
    elif not os.path.isfile(fetch_weights(weights).path):
        raise UserError(f"MODEL.WEIGHTS {weights} is not a file (looked for in {Path.cwd()})")


def _scaled(cfg: CfgNode, processes: int) -> str:
    """Describes the recipe scaled to this number of processes; "" if it cannot be scaled."""
    solver = cfg.SOLVER
    if solver.REFERENCE_WORLD_SIZE or solver.IMS_PER_BATCH % (
        _RECIPE_GPUS * solver.GRAD_ACCUM_STEPS
    ):
        return ""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = _RECIPE_GPUS
    solver = DefaultTrainer.auto_scale_workers(cfg, processes).SOLVER
    keys = ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS")
    settings = ", ".join(f"SOLVER.{key} {solver[key]}" for key in keys)
    return f", or add SOLVER.REFERENCE_WORLD_SIZE {_RECIPE_GPUS}, which makes it {settings}"


def _check_batch(cfg: CfgNode, processes: int) -> None:
    try:
        images = micro_batch_size(cfg, processes)
    except UsageError as error:
        raise UsageError(f"{error}{_scaled(cfg, processes)}") from error
    node = cfg.MODEL.CLASSIFIER
    mixes = cfg.MODEL.META_ARCHITECTURE == "ImageClassifier" and (
        node.MIXUP_ALPHA or node.CUTMIX_ALPHA
    )
    if mixes and images % 2:
        raise UsageError(
            "mixup and CutMix require an even number of images per process and pass, not "
            f"{images}: change SOLVER.IMS_PER_BATCH, or set MODEL.CLASSIFIER.MIXUP_ALPHA and "
            "CUTMIX_ALPHA to 0"
        )
    head = cfg.MODEL.SEM_SEG_HEAD
    if cfg.MODEL.META_ARCHITECTURE not in SEGMENTORS or head.NAME != "PSPHead":
        return
    # PSPHead pools a map to one pixel, so batch statistics need at least two images.
    normed = {"BN": images, "SyncBN": images * processes, "naiveSyncBN": images * processes}
    if normed.get(head.NORM, 2) < 2:
        raise UsageError(
            f"PSPHead with MODEL.SEM_SEG_HEAD.NORM {head.NORM} needs at least 2 images per pass: "
            "raise SOLVER.IMS_PER_BATCH, or set the norm to GN"
        )


def _check_warmup(cfg: CfgNode) -> list[str]:
    """Returns a warning if the training ends before its warm-up does."""
    solver = cfg.SOLVER
    if solver.WARMUP_ITERS < solver.MAX_ITER:
        return []
    return [
        f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} is not below SOLVER.MAX_ITER "
        f"{solver.MAX_ITER}: the whole training is warm-up, and ends before the warm-up does"
    ]


def _datasets(settings: RunSettings) -> list[str]:
    """Returns the names of the data sets of a run, without duplicates."""
    names = settings.cfg.DATASETS
    used = names.TEST if settings.eval_only else (*names.TRAIN, *names.TEST)
    return list(dict.fromkeys(used))


def _check_truth(settings: RunSettings) -> None:
    """Checks that a training's test sets have annotations."""
    for name in () if settings.eval_only else settings.cfg.DATASETS.TEST:
        if not has_truth(settings.cfg, name):
            raise UserError(
                f"data set {name} of DATASETS.TEST has no annotations to evaluate a training on: "
                "remove it; --eval-only writes its results for the evaluation server"
            )


def check_inputs(settings: RunSettings, data: bool = True) -> Remarks:
    """Checks everything that does not depend on the machine, such as data sets and weights.

    Args:
        settings: settings of the run.
        data: whether to check the data sets; not needed if they were checked before.

    Returns:
        Warnings and notes for the log of the run.

    Raises:
        UserError: for the first error.
    """
    cfg, datasets = settings.cfg, _datasets(settings)
    if not datasets:
        raise UsageError("DATASETS.TRAIN and DATASETS.TEST are empty")
    if not settings.eval_only:
        if not cfg.DATASETS.TRAIN:
            raise UsageError("DATASETS.TRAIN is empty: set it, or add --eval-only")
        _check_batch(cfg, settings.processes.world_size)
    _check_weights(settings)
    # Only one of a launcher's processes per machine reads the annotation files.
    remarks = Remarks([] if settings.eval_only else _check_warmup(cfg), [])
    if data and settings.processes.environment.local_rank == 0:
        trained = None
        if settings.eval_only:
            trained = read_class_names(settings.checkpoint.path or cfg.MODEL.WEIGHTS) or []
        found = check_datasets(cfg, datasets, trained)
        remarks = Remarks([*remarks.warnings, *found.warnings], found.notes)
        _check_truth(settings)
    for name in cfg.DATASETS.TEST:
        if name in DatasetCatalog:
            check_evaluator(name)
    if not settings.eval_only:
        check_best_metric(cfg)
        check_trackers(cfg)
    return remarks


def _check_moved(file: str, content: dict, cfg: CfgNode) -> None:
    """Checks that training sets with new paths have as many images, and the same classes."""
    images = (trainer_state(content).get("stream") or {}).get("images")
    found = len(load_dataset_dicts(cfg, cfg.DATASETS.TRAIN, train=True))
    if images is not None and images != found:
        raise refusal(
            file, [f"DATASETS.REGISTER: its training sets had {images} images, not {found}"]
        )
    before = (content.get(METADATA) or {}).get("classes")
    now = dataset_class_names(cfg, cfg.DATASETS.TRAIN)
    if before and now and (difference := describe_difference(now, before)):
        raise refusal(file, [f"the classes of DATASETS.REGISTER's training sets ({difference})"])


def resume_settings(settings: RunSettings, data: bool = True) -> RunSettings:
    """Returns the settings of a resumed run; unchanged if there is no checkpoint.

    Args:
        settings: settings from the command line.
        data: whether to check training sets whose files have another path than before.

    Raises:
        UserError: for settings that a resume cannot change, or a checkpoint without training state.
    """
    cfg, file = settings.cfg, settings.checkpoint.path
    if settings.eval_only or not file:
        return settings
    content = read_checkpoint(file)
    if "iteration" not in trainer_state(content):
        raise UserError(
            f"{file} holds weights without the training state that resuming requires: start "
            f"from it in another OUTPUT_DIR without --resume, with MODEL.WEIGHTS {file}"
        )
    resumed = resume_config(Before.of(file, content, cfg), cfg)
    if resumed.moved and data and settings.processes.environment.local_rank == 0:
        _check_moved(file, content, cfg)
    notes = (*settings.notes, *resumed.lines)
    return replace(settings, cfg=resumed.cfg, notes=notes, scaled=resumed.scaled)


def check_run(settings: RunSettings) -> RunSettings:
    """Checks device, output folder, weights and data sets; creates the output folder.

    Returns:
        The settings of the run, with the notes and warnings of the checks.

    Raises:
        UserError: for the first error.
    """
    check_device(settings.cfg, settings.processes)
    _check_not_in_use(settings)
    settings = resume_settings(settings)
    remarks = check_inputs(settings)
    check_output(settings)
    if settings.processes.environment.local_rank == 0:
        cache_cityscapes(settings.cfg, _datasets(settings))
    return replace(
        settings,
        notes=(*settings.notes, *remarks.notes),
        warnings=(*settings.warnings, *remarks.warnings),
    )
