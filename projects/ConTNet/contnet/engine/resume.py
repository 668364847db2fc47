"""Resumes with settings that differ from the checkpoint's.

Keys of the network, its losses, the kind of optimiser and the training sets cannot change. All
others take effect from the next iteration. If the batch size changes, the learning rate and all
periods and lengths in iterations are scaled, unless they were changed, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from detectron2.config import CfgNode

from contnet.checkpoint.metadata import METADATA
from contnet.config.differences import differences, read_values, show
from contnet.config.nodes import flatten, get_value
from contnet.config.values import check_values
from contnet.utils.errors import UserError

__all__ = [
    "Before",
    "Resumed",
    "differing_keys",
    "refusal",
    "resume_config",
    "resumed_iteration",
    "trainer_state",
]

BATCH = "SOLVER.IMS_PER_BATCH"
_END = "SOLVER.MAX_ITER"
_PROCESSES = "SOLVER.REFERENCE_WORLD_SIZE"
_REGISTER = "DATASETS.REGISTER"
_STAYS = ("DATASETS.TRAIN", "INPUT.FORMAT", "SOLVER.OPTIMIZER")
# MODEL keys that affect neither the network's function nor its losses: initial weights, device,
# memory use, frozen layers, and settings that matter only in an evaluation.
_FREE = re.compile(
    r"MODEL\.(?:WEIGHTS|DEVICE|ALLOW_MISSING_WEIGHTS|CONTNET\.(?:GRAD_CHECKPOINTING|SDPA)"
    r"|CLASSIFIER\.CHANNELS_LAST|.*\.FREEZE_AT|.*_TEST|PANOPTIC_FPN\.COMBINE\..*)"
)
# Norms over all processes, which are equivalent.
_SYNC_NORMS = ("SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
# Keys that are not logged with the other differences: the folder may be moved, and SEED and
# DATASETS.REGISTER have their own lines.
_SILENT = ("OUTPUT_DIR", "SEED", _REGISTER)


# --- a checkpoint's settings ---------------------------------------------------------------------


def _mapping(value: object) -> Mapping:
    return value if isinstance(value, Mapping) else {}


def trainer_state(content: Mapping) -> dict:
    """Returns the state of the trainer in a checkpoint, with this project's keys.

    Args:
        content: content of a checkpoint. Detectron2's trainers save the states of the optimiser and
            the scaler one level deeper; their first version saved them next to the model.
    """
    trainer = _mapping(content.get("trainer"))
    old = {key: content[key] for key in ("iteration", "optimizer") if key in content}
    below = {**old, **_mapping(trainer.get("_trainer"))}
    return {**below, **{key: value for key, value in trainer.items() if key != "_trainer"}}


@dataclass(frozen=True)
class Before:
    """The settings of a checkpoint's run.

    Attributes:
        file: file of the checkpoint.
        config: values by key; None if they are unknown.
        scaled: original value of each key that a resume with another batch size has scaled, and the
            batch size that the value was set for.
        seed: seed of the order of the images; None if it is unknown.
        optimizer: SGD or AdamW; "" if it is unknown.
    """

    file: str
    config: Mapping[str, object] | None = None
    scaled: Mapping[str, list] = field(default_factory=dict)
    seed: int | None = None
    optimizer: str = ""

    @classmethod
    def of(cls, file: str, content: Mapping, cfg: CfgNode) -> Before:
        """Reads the content of a checkpoint.

        Args:
            file: its file name.
            content: its content.
            cfg: a config with all known keys.
        """
        text = _mapping(content.get(METADATA)).get("config")
        try:
            config = read_values(text, cfg) if text else None
        except ValueError as error:
            raise UserError(f"{file}: the config in it is damaged ({error})") from error
        state = trainer_state(content)
        return cls(
            file,
            config,
            _mapping(state.get("scaled_settings")),
            _mapping(state.get("stream")).get("seed", config["SEED"] if config else None),
            _kind_of_optimizer(state),
        )

    @property
    def batch(self) -> int:
        """Images per iteration; 0 if they are unknown."""
        return self.config[BATCH] if self.config else 0


def _kind_of_optimizer(state: Mapping) -> str:
    groups = _mapping(state.get("optimizer")).get("param_groups") or [{}]
    return "AdamW" if "betas" in groups[0] else "SGD" if "momentum" in groups[0] else ""


# --- another batch size --------------------------------------------------------------------------


def _iterations(value: int, ratio: float) -> int:
    """Scales a period or a length: 0 stays 0, others are at least 1."""
    return max(round(value / ratio), 1) if value else value


# How values are scaled for a batch size that is ``ratio`` times as large. MAX_ITER is rounded up so
# that no image of the training is lost, and STEPS down so that they stay before the end.
_RULES = {
    "SOLVER.BASE_LR": lambda value, ratio: value * ratio,
    "SOLVER.BASE_LR_END": lambda value, ratio: value * ratio,
    _END: lambda value, ratio: math.ceil(value / ratio),
    "SOLVER.STEPS": lambda value, ratio: [max(math.floor(step / ratio), 1) for step in value],
    "SOLVER.WARMUP_ITERS": _iterations,
    "SOLVER.CHECKPOINT_PERIOD": _iterations,
    "TEST.EVAL_PERIOD": _iterations,
    "TEST.LOSS_PERIOD": _iterations,
}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _follow_batch(before: Before, cfg: CfgNode) -> tuple[dict[str, list], list[str]]:
    """Scales settings for another batch size, in place.

    Returns:
        Original values and batch sizes of scaled keys, and a description of each change.
    """
    old, new = before.config[BATCH], cfg.SOLVER.IMS_PER_BATCH
    scaled, changes = {}, []
    processes = (before.config[_PROCESSES], cfg.SOLVER.REFERENCE_WORLD_SIZE)
    if all(processes) and processes[0] != processes[1]:
        return scaled, changes  # already scaled to REFERENCE_WORLD_SIZE
    for key, rule in _RULES.items():
        value = _plain(get_value(cfg, key))
        known = [before.scaled.get(key), (before.config[key], old)]
        batch = next((batch for given, batch in filter(None, known) if given == value), new)
        if batch == new or not value:  # changed, set for this batch size, or off
            continue
        scaled[key] = [value, batch]
        follows = rule(value, new / batch)
        cfg.merge_from_list([key, follows])
        if follows != before.config[key]:
            changes.append(show(key, before.config[key], follows))
    return scaled, changes


def resumed_iteration(images: int, iterations: int, before: Before, cfg: CfgNode) -> int:
    """Returns the iteration to resume at after a change of the batch size.

    Args:
        images: number of images seen.
        iterations: number of completed iterations.
        before: the checkpoint's settings; ``config`` is not None.
        cfg: the current config.
    """
    end = cfg.SOLVER.MAX_ITER
    full = before.config[_END] * before.batch / cfg.SOLVER.IMS_PER_BATCH
    if iterations >= before.config[_END] and end == math.ceil(full):
        return end  # the training has finished, despite rounding
    return images // cfg.SOLVER.IMS_PER_BATCH


# --- other settings ------------------------------------------------------------------------------


def _same_sync_norm(key: str, values: tuple) -> bool:
    return key.endswith(".NORM") and all(value in _SYNC_NORMS for value in values)


def _is_refused(key: str, values: tuple) -> bool:
    if key.startswith("MODEL."):
        return not _FREE.fullmatch(key) and not _same_sync_norm(key, values)
    return key in _STAYS


def _moved(before: list, now: list) -> dict[str, list]:
    """Returns old and new files, by name, of the data sets whose files have changed."""
    places = [{name: paths for name, *paths in entries} for entries in (before, now)]
    names = dict.fromkeys([*places[0], *places[1]])
    pairs = {name: [place.get(name, "none") for place in places] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def refusal(file: str, changes: list[str]) -> UserError:
    """Returns the error message for changes that a resume does not support."""
    return UserError(
        f"--resume from {file} cannot change {'; '.join(changes)}: set it back to resume this "
        "run, or start a new one in another OUTPUT_DIR without --resume, with MODEL.WEIGHTS "
        f"{file}"
    )


@dataclass(frozen=True)
class Resumed:
    """The settings of a resumed run.

    Attributes:
        cfg: the config, frozen.
        scaled: as in :class:`Before`, for checkpoints.
        lines: differences from the checkpoint's settings, for the log.
        moved: whether files of training sets have another path.
    """

    cfg: CfgNode
    scaled: dict[str, list] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    moved: bool = False


def _keep_seed(before: Before, cfg: CfgNode) -> list[str]:
    """Sets the checkpoint's seed; returns a log line if the config has another seed."""
    seed, asked = before.seed, cfg.SEED
    if seed is None or seed < 0:
        return []
    cfg.SEED = seed
    if asked in (-1, seed):
        return []
    return [
        f"{show('SEED', seed, asked)}: the order of the images and the random state are still "
        f"those of {seed}"
    ]


def _follow(before: Before, cfg: CfgNode) -> tuple[dict[str, list], list[str]]:
    """Scales to the batch size, in place; returns scaled keys and a log line per difference."""
    changed = differences(before.config, cfg)
    if found := [show(key, *pair) for key, pair in changed.items() if _is_refused(key, pair)]:
        raise refusal(before.file, found)
    scaled, follows = _follow_batch(before, cfg)
    lines = []
    if follows:
        batch = show(BATCH, *changed[BATCH]) if BATCH in changed else BATCH
        lines.append(f"{batch}: scaled with it, {', '.join(follows)}")
        try:
            check_values(cfg)
        except UserError as error:
            raise UserError(f"scaled to {batch}: {error}") from error
    for key, pair in differences(before.config, cfg).items():
        if key in _SILENT or key in scaled or (key == BATCH and follows):
            continue
        note = " (ignored: the run resumes from its checkpoint)" if key == "MODEL.WEIGHTS" else ""
        lines.append(show(key, *pair) + note)
    if unknown := sorted(before.config.keys() - dict(flatten(cfg, cfg)).keys()):
        lines.append(f"{before.file} was trained with unknown keys: {unknown}")
    return scaled, lines


def resume_config(before: Before, cfg: CfgNode) -> Resumed:
    """Returns the config of a resumed run.

    Args:
        before: the checkpoint's settings.
        cfg: the config of the command.

    Raises:
        UserError: for keys that cannot change, or if the config cannot be scaled to its batch size.
    """
    kind = cfg.SOLVER.OPTIMIZER
    cfg = cfg.clone()
    cfg.defrost()
    lines, scaled, moved = _keep_seed(before, cfg), {}, {}
    if before.config is None:
        if before.optimizer not in ("", kind):
            raise refusal(before.file, [show("SOLVER.OPTIMIZER", before.optimizer, kind)])
        lines.append(
            f"{before.file} does not hold the config of its run: the current settings are used "
            "without a comparison"
        )
    else:
        scaled, differing = _follow(before, cfg)
        moved = _moved(before.config[_REGISTER], cfg.DATASETS.REGISTER)
        lines += differing
        lines += [show(f"{_REGISTER} {name}", *pair) for name, pair in moved.items()]
    cfg.freeze()
    return Resumed(cfg, scaled, tuple(lines), not moved.keys().isdisjoint(cfg.DATASETS.TRAIN))


def differing_keys(before: Before, cfg: CfgNode) -> list[str]:
    """Returns the keys whose values differ from those that a run was started with.

    Args:
        before: the checkpoint's settings.
        cfg: the current config.
    """
    if before.config is None:
        return []
    given = {key: value for key, (value, _) in before.scaled.items()}
    return list(differences({**before.config, **given}, cfg))
