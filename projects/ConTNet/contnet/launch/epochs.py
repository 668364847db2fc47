"""Converts settings in epochs into iterations before a run starts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from detectron2.config import CfgNode

from contnet.config import check_values, set_level
from contnet.config.nodes import config_error, get_value
from contnet.data.datasets.classification import ClassificationSource
from contnet.data.datasets.register import find_source
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.loader import build_order
from contnet.data.validation.dataset import check_datasets
from contnet.utils.errors import UserError

__all__ = ["ITERATION_KEYS", "set_iterations", "used_epoch_keys"]

# Keys of settings in epochs, with the keys of the same settings in iterations.
ITERATION_KEYS = {
    "SOLVER.MAX_EPOCHS": "SOLVER.MAX_ITER",
    "SOLVER.STEPS_EPOCHS": "SOLVER.STEPS",
    "SOLVER.WARMUP_EPOCHS": "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD_EPOCHS": "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD_EPOCHS": "TEST.EVAL_PERIOD",
    "TEST.LOSS_PERIOD_EPOCHS": "TEST.LOSS_PERIOD",
}


def used_epoch_keys(cfg: CfgNode, config_file: str, opts: Sequence[str]) -> list[str]:
    """Finds the keys in epochs that are used.

    If a setting is given in epochs and in iterations, the one closer to the command line is used,
    so a config file can override its ``_BASE_`` in the other unit.

    Args:
        cfg: config that was read from the other arguments.
        config_file: a yaml file.
        opts: ``[KEY, VALUE, KEY, VALUE, ...]``.

    Raises:
        UserError: if both are set by the same file, or by the config file and the overrides.
    """
    used = []
    for key, other in ITERATION_KEYS.items():
        if not (value := get_value(cfg, key)):
            continue
        level, its_level = (set_level(each, config_file, opts) for each in (key, other))
        if level is not None and level == its_level:
            raise config_error(
                f"{key} {value!r} and {other} {get_value(cfg, other)!r} are both set: remove "
                f"one (or set {key} {type(value)()!r})"
            )
        if its_level is None or (level is not None and level < its_level):
            used.append(key)
    return used


def _count_images(cfg: CfgNode) -> float:
    """Counts the images in an epoch, as the loader does.

    Raises:
        UserError: if the data sets have errors.
    """
    names = cfg.DATASETS.TRAIN
    # The check keeps the annotations, so that files are parsed only once. Lists of labelled images
    # are checked when they are created.
    annotated = [name for name in names if not isinstance(find_source(name), ClassificationSource)]
    check_datasets(cfg, annotated)
    order = build_order(cfg, load_dataset_dicts(cfg, names, train=True), seed=0)
    return round(order.images_per_epoch, 1)


def _iterations(epochs: float, images: float, batch: int) -> int:
    """Returns the first iteration at which this number of epochs is complete."""
    return max(1, math.ceil(round(epochs * images / batch, 6)))


def set_iterations(cfg: CfgNode, keys: Sequence[str]) -> list[str]:
    """Sets iterations from settings in epochs, and resets all settings in epochs.

    Args:
        cfg: config with the final batch size of the run.
        keys: from :func:`used_epoch_keys`.

    Returns:
        The changes, a line each.

    Raises:
        UserError: if a data set has errors, or the iterations contradict each other.
    """
    given = [key for key in ITERATION_KEYS if get_value(cfg, key)]
    if not given or not cfg.DATASETS.TRAIN:  # check_inputs reports missing training sets
        return []
    notes = []
    if keys:
        images, batch = _count_images(cfg), cfg.SOLVER.IMS_PER_BATCH
    for key in keys:
        other, epochs = ITERATION_KEYS[key], get_value(cfg, key)
        if isinstance(epochs, (list, tuple)):
            value = tuple(_iterations(each, images, batch) for each in epochs)
            shown = f"{epochs}"
        else:
            value = _iterations(epochs, images, batch)
            shown = f"{epochs:g}"
        cfg.merge_from_list([other, value])
        notes.append(f"{other} {value}: {key} {shown} of {images:.12g} images, {batch} a step")
    for key in given:
        cfg.merge_from_list([key, type(get_value(cfg, key))()])
    try:
        check_values(cfg)
    except UserError as error:
        raise UserError(f"{error} ({'; '.join(notes)})" if notes else str(error)) from error
    return notes
