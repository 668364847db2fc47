"""Restores the parts of a training's state from a checkpoint, or initialises them with a warning.

A checkpoint may lack a part if it was disabled in its run, or if it is from an earlier version or
another trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from contnet.config.nodes import flatten
from contnet.engine.optimizer import matching_state, parameter_names
from contnet.engine.resume import Before
from contnet.utils.text import first_names, plural

__all__ = [
    "loss_normalizers",
    "restore_ema",
    "restore_loss_normalizers",
    "restore_optimizer",
    "restore_scaler",
    "tell_of_rest",
]

logger = logging.getLogger(__name__)

# Known keys of checkpoints and trainer states; __author__ and matching_heuristics are Detectron2's.
_CONTENT = {
    "contnet",
    "trainer",
    "ema",
    "unfinished",
    "smoothing_hints",
    "temporary",
    "iteration",
    "optimizer",
    "__author__",
    "matching_heuristics",
}
_TRAINER = {
    "iteration",
    "hooks",
    "optimizer",
    "stream",
    "grad_scaler",
    "loss_normalizers",
    "scaled_settings",
    "weights_warnings",
    "classes",  # from the first version
}


def restore_ema(ema: ModelEmaV3 | None, model: nn.Module, content: Mapping, file: str) -> None:
    """Restores the EMA, or starts it from the checkpoint's weights if the checkpoint has none."""
    if ema is None:
        if "ema" in content:
            logger.warning(f"{file} has an EMA, which is discarded: SOLVER.EMA.ENABLED is False")
        return
    why = "has no EMA"
    if "ema" in content:
        try:
            ema.load_state_dict(content["ema"])
            return
        except (AttributeError, RuntimeError, TypeError):
            why = "has an EMA of other tensors"
    ema.set(model)
    logger.warning(f"{file} {why}: the EMA starts from the last weights")


def restore_scaler(scaler: GradScaler, state: Mapping, file: str) -> None:
    """Restores the loss scaler of float16."""
    saved = state.get("grad_scaler")
    if not scaler.is_enabled():
        if saved:
            logger.warning(
                f"{file} has a loss scaler, which is discarded: SOLVER.AMP is no longer float16"
            )
    elif saved:
        scaler.load_state_dict(saved)
    else:
        logger.warning(
            f"{file} has no loss scaler: the float16 loss scaler starts at {scaler.get_scale():g}"
        )


def loss_normalizers(model: nn.Module) -> dict[str, float]:
    """Running loss normalisers of dense detectors, which are plain attributes in Detectron2."""
    return {
        name: float(module.loss_normalizer)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "loss_normalizer", None), (int, float))
    }


def restore_loss_normalizers(model: nn.Module, state: Mapping, file: str) -> None:
    """Restores the result of :func:`loss_normalizers`; untrained models lack these attributes."""
    modules = dict(model.named_modules())
    saved = state.get("loss_normalizers", {})
    for name in saved.keys() & modules.keys():
        modules[name].loss_normalizer = saved[name]
    if left := sorted(saved.keys() - modules.keys()):
        logger.warning(f"{file} has loss normalisers of parts that the model does not have: {left}")
    if not saved and any(isinstance(module, DenseDetector) for module in modules.values()):
        logger.warning(
            f"{file} has no running loss normaliser, which starts from its initial value"
        )


def _old_names(
    state: Mapping, before: Before, cfg: CfgNode, model: nn.Module
) -> Sequence[Sequence[str]] | None:
    """Parameter names in each group of a checkpoint's optimiser; None if they are unknown."""
    groups = state["param_groups"]
    if all("param_names" in group for group in groups):
        return [group["param_names"] for group in groups]
    cfg = cfg.clone()
    cfg.defrost()
    known = dict(flatten(cfg, cfg))
    for key, value in (before.config or {}).items():
        if key.startswith("SOLVER.") and key in known:  # unknown keys are logged elsewhere
            cfg.merge_from_list([key, value])
    names = parameter_names(cfg, model)
    sizes = [[len(each) for each in known] for known in (names, [g["params"] for g in groups])]
    return names if sizes[0] == sizes[1] else None


def restore_optimizer(
    optimizer: Optimizer, model: nn.Module, cfg: CfgNode, state: Mapping, before: Before
) -> None:
    """Restores the optimiser state of each parameter, but not the optimiser's settings."""
    saved = state.get("optimizer")
    names = _old_names(saved, before, cfg, model) if saved else None
    if names is None:
        why = "has an optimiser state without names" if saved else "has no optimiser state"
        logger.warning(f"{before.file} {why}: the optimiser starts from scratch")
        return
    matching, new = matching_state(optimizer, saved, names)
    optimizer.load_state_dict(matching)
    if new:
        logger.warning(
            f"{before.file} has no optimiser state for {plural(len(new), 'parameter')}, which "
            f"starts from scratch: {first_names(new)}"
        )


def tell_of_rest(content: Mapping, state: Mapping, known: Sequence[str], file: str) -> None:
    """Logs the parts of a checkpoint that the run does not use.

    Args:
        content: content of the checkpoint, without the model.
        state: state of the trainer.
        known: names of other objects that the run restores.
        file: file of the checkpoint.
    """
    left = [name for name in content if name not in _CONTENT and name not in known]
    left += [f"trainer.{name}" for name in state if name not in _TRAINER]
    if left:
        logger.warning(f"{file} also has {', '.join(map(str, left))}, which this run does not use")
