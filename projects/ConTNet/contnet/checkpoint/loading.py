"""What becomes of a file's weights before a model takes them: names translated, values checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from contnet.checkpoint.key_mapping import (
    convert_resnet_state_dict,
    convert_state_dict,
    is_resnet,
    torchvision_name,
)
from contnet.checkpoint.reading import strip_wrapper_prefix
from contnet.modeling.backbone import backbone_prefix
from contnet.modeling.classifier import ImageClassifier
from contnet.modeling.encoder import Encoder
from contnet.utils.errors import UserError
from contnet.utils.text import describe_difference, first_names

__all__ = [
    "check_class_names",
    "check_pre_norm",
    "check_tensors",
    "conversion_advice",
    "translate_names",
]

logger = logging.getLogger(__name__)


def conversion_advice(path: str) -> str:
    """What may help with a file that does not fit."""
    return (
        f"python tools/convert_weights.py {path} NEW.pth says what it holds, and makes weights of "
        "a ConTNet or ResNet in it fit"
    )


# --- names ---------------------------------------------------------------------------------------


def _under_backbone(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors by the names that they have in a model."""
    prefix = backbone_prefix(model)
    keep_head = isinstance(model, ImageClassifier)
    return {
        prefix + name: value
        for name, value in state.items()
        if keep_head or not name.startswith(("head.", "linear."))
    }


def _convert_authors(state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    converted, report = convert_state_dict(state)
    if left := report.unexpected:
        logger.warning(
            f"{path}: {len(left)} tensors are no part of a ConTNet and are left out "
            f"({first_names(left)})"
        )
    return converted


def _converted(model: nn.Module, path: str, convert: Callable[[], dict]) -> dict[str, Tensor]:
    try:
        return _under_backbone(model, convert())
    except ValueError as error:
        raise UserError(f"{path}: {error}; {conversion_advice(path)}") from error


def translate_names(model: nn.Module, state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Translates the names of a state dict to those of a model.

    Args:
        model: that shall take them.
        state: of a detector or classifier of ours, the ConTNet authors' network, or a ResNet of
            torchvision, timm or Detectron2.
        path: of the file, for messages.

    Raises:
        UserError: if it is a network whose tensors do not fit together.
    """
    state = {strip_wrapper_prefix(name): value for name, value in state.items()}
    classifies = isinstance(model, ImageClassifier)
    if not classifies:
        state = {name.removeprefix("network."): value for name, value in state.items()}
    if any(name.endswith("layer0.conv.conv.weight") for name in state):
        return _converted(model, path, lambda: _convert_authors(state, path))
    if classifies:
        if "stem.conv1.weight" in state:
            state = {torchvision_name(name): value for name, value in state.items()}
        prefix = backbone_prefix(model)
        bare = not any(name.startswith(prefix) for name in state)
        return _under_backbone(model, state) if bare else state
    if is_resnet(state):
        return _converted(model, path, lambda: convert_resnet_state_dict(state))
    if "stem.weight" not in state and "stem.conv1.weight" not in state:
        return state
    return _under_backbone(model, state)


# --- values --------------------------------------------------------------------------------------


def check_tensors(model: nn.Module, state: Mapping[str, Tensor], prefix: str, path: str) -> None:
    """Refuses damaged and quantised weights, which would load without a word.

    Args:
        model: that shall take them.
        state: by the model's names.
        prefix: of the tensors that are wanted.
        path: of the file, for messages.

    Raises:
        UserError: naming the first such tensor.
    """
    for name, own in model.state_dict().items():
        if name not in state or not name.startswith(prefix):
            continue
        value = torch.as_tensor(state[name])
        if own.is_floating_point() and not value.is_floating_point():
            raise UserError(
                f"{path}: {name} holds {value.dtype}, as of quantised weights, where {own.dtype} "
                "is needed: give weights that are not quantised"
            )
        if own.is_floating_point() and not value.isfinite().all():
            raise UserError(
                f"{path}: {name} is not finite: the file is damaged, or its training had "
                "diverged; give an earlier checkpoint, or copy the file again"
            )


# --- what the file says of itself ----------------------------------------------------------------


def _renaming(model: nn.Module) -> str:
    if isinstance(model, ImageClassifier):
        return (
            "rename its class folders, or for a flat folder write the names in that order into "
            "classes.txt in it"
        )
    return "give data that has these names in this order, or weights of a run on this data"


def check_class_names(
    model: nn.Module, ours: Sequence[str] | None, theirs: Sequence[str] | None, path: str
) -> None:
    """Compares names of classes, for labels are numbers that mean nothing without them.

    Args:
        model: that shall take the weights.
        ours: names of the data's classes, in order; None where nothing tells them.
        theirs: those of the file.
        path: of the file, for messages.

    Raises:
        UserError: if they differ.
    """
    if theirs is None or ours is None:
        who = "the data set does" if theirs else f"{path} does"
        logger.warning(
            f"{who} not name its classes: nothing shows whether the numbers of the data's labels "
            "and of the weights' outputs mean the same"
        )
    elif differing := describe_difference(ours, theirs):
        raise UserError(
            f"the data's {len(ours)} classes are not the {len(theirs)} that {path} was trained on "
            f"({differing}): {_renaming(model)}"
        )


def check_pre_norm(model: nn.Module, metadata: object, path: str) -> None:
    """Compares what a file of tools/convert_weights.py says, since tensors do not show it.

    Args:
        model: that shall take the weights.
        metadata: of the file.
        path: of the file, for messages.

    Raises:
        UserError: if its ConTNet normalises at another place.
    """
    options = metadata.get("options") if isinstance(metadata, Mapping) else None
    theirs = options.get("pre_norm") if isinstance(options, Mapping) else None
    ours = {each.pre_norm for each in model.modules() if isinstance(each, Encoder)}
    if theirs is not None and ours - {theirs}:
        raise UserError(
            f"{path} says that its ConTNet has pre_norm {theirs}: set MODEL.CONTNET.PRE_NORM "
            f"{theirs}, or convert the weights again with or without --pre-norm"
        )
