"""Loads weights into a model: names translated, values and facts checked, all of it or nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.layers import FrozenBatchNorm2d
from fvcore.common.checkpoint import (
    get_missing_parameters_message,
    get_unexpected_parameters_message,
)
from torch import Tensor, nn

from contnet.checkpoint.key_mapping import (
    convert_resnet_state_dict,
    convert_state_dict,
    locate_networks,
    torchvision_name,
)
from contnet.checkpoint.metadata import Metadata, check_class_names, check_network
from contnet.checkpoint.reading import Weights, conversion_advice
from contnet.modeling.backbone import backbone_prefix
from contnet.modeling.classifier import ImageClassifier
from contnet.modeling.contnet import ConTNet
from contnet.utils.errors import UserError
from contnet.utils.text import first_names

__all__ = ["load_weights"]

logger = logging.getLogger(__name__)

_HEADS = ("head.", "fc.", "linear.")
_COUNT = "num_batches_tracked"


# --- names ---------------------------------------------------------------------------------------


def _convert_authors(state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    converted, report = convert_state_dict(state)
    if left := report.unexpected:
        logger.warning(
            f"{path}: {len(left)} tensors are no part of a ConTNet and are left out "
            f"({first_names(left)})"
        )
    return converted


def _network_in_form(weights: Weights, form: str) -> dict[str, Tensor]:
    """A file's network by the names of another form; as it is, if it is of another family."""
    state = weights.network_tensors()
    if (weights.form, form) == ("authors", "contnet"):
        return _convert_authors(state, weights.path)
    if (weights.form, form) == ("timm", "detectron2"):
        return convert_resnet_state_dict(state)
    if (weights.form, form) == ("detectron2", "timm"):
        return {torchvision_name(name): value for name, value in state.items()}
    return state


def _name_as_in(model: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """A file's tensors by a model's names.

    Raises:
        UserError: if its network cannot be translated.
    """
    own = model.state_dict()
    if weights.matching:
        c2 = weights.matching == "caffe2"
        return align_and_update_state_dicts(own, dict(weights.tensors), c2_conversion=c2)
    targets = locate_networks(own)
    if not weights.form or len(targets) != 1:
        bare = not any(name.startswith("network.") for name in weights.tensors)
        prefix = "network." if bare and isinstance(model, ImageClassifier) else ""
        return {prefix + name: value for name, value in weights.tensors.items()}
    form, prefix = targets[0]
    if (form, prefix) == (weights.form, weights.prefix):
        return weights.tensors
    try:
        network = _network_in_form(weights, form)
    except ValueError as error:
        raise UserError(f"{weights.path}: {error}; {conversion_advice(weights.path)}") from error
    return {
        prefix + name: value
        for name, value in network.items()
        if prefix + name in own or not name.startswith(_HEADS)
    }


# --- values --------------------------------------------------------------------------------------


def _check_values(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str) -> None:
    """Refuses damaged and quantised weights, which would load without a word."""
    for name, expected in own.items():
        if name not in state or not expected.is_floating_point():
            continue
        value = state[name]
        if not value.is_floating_point():
            raise UserError(
                f"{path}: {name} holds {value.dtype}, as of quantised weights, where "
                f"{expected.dtype} is needed: give weights that are not quantised"
            )
        if not value.isfinite().all():
            raise UserError(
                f"{path}: {name} is not finite: the file is damaged, or its training had "
                "diverged; give an earlier checkpoint, or copy the file again"
            )


def _frozen_statistics(model: nn.Module) -> set[str]:
    """Names of the statistics that a FrozenBN fills in by itself, where a file has none."""
    return {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, FrozenBatchNorm2d)
        for leaf in ("running_mean", "running_var")
    }


def _head_names(model: nn.Module) -> list[str]:
    """Full names of the tensors that depend on the number of classes; none of a detector."""
    if isinstance(model, ImageClassifier):
        return model.head_names()
    if isinstance(model, ConTNet):
        return [name for name in model.state_dict() if name.startswith("head.")]
    return []


def _advice(
    model: nn.Module, weights: Weights, absent: list[str], misshapen: list[str], whole: bool
) -> str:
    if not whole:
        return (
            "give weights of this very backbone (variant and options), or allow it with "
            f"MODEL.ALLOW_MISSING_WEIGHTS True; {conversion_advice(weights.path)}"
        )
    if not absent and set(misshapen) <= set(_head_names(model)):
        return "its head is for another number of classes than MODEL.CLASSIFIER.NUM_CLASSES"
    if not absent:
        return "it is a checkpoint of another architecture, or of another number of classes"
    first = next(iter(weights.tensors))
    return f"it is a checkpoint of another architecture, its first tensor is {first!r}"


def _check_complete(
    model: nn.Module,
    weights: Weights,
    wanted: Sequence[str],
    state: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    whole: bool,
    allow_missing: bool,
) -> None:
    """Logs how much of what is wanted is given, and refuses less than all."""
    misshapen = [name for name in wanted if name in state and name not in given]
    filled = _frozen_statistics(model) if weights.matching else ()
    absent = [name for name in wanted if name not in state and name not in filled]
    loaded = len(wanted) - len(misshapen) - len(absent)
    what = "model" if whole else "backbone"
    line = f"{loaded} of the {len(wanted)} tensors of the {what} came from the file"
    if absent:
        line += f"; {len(absent)} are not in it ({first_names(absent)})"
    if misshapen:
        line += f"; {len(misshapen)} have another shape ({first_names(misshapen)})"
    if (absent or misshapen) and (whole or not allow_missing):
        raise UserError(f"{line}; {_advice(model, weights, absent, misshapen, whole)}")
    logger.info(line)


# --- the whole -----------------------------------------------------------------------------------


def _backbone_prefix(model: nn.Module, path: str) -> str:
    try:
        return backbone_prefix(model)
    except ValueError as error:
        raise UserError(f"{path} cannot begin this model: {error}") from error


def _takes_head(model: nn.Module, given: Mapping[str, Tensor]) -> bool:
    """Whether what fits has parts that tell classes apart."""
    if head := _head_names(model):
        return any(name in given for name in head)
    # Pyramids and proposals know no classes.
    return any(not name.startswith(("backbone.", "proposal_generator.")) for name in given)


def _must_have_classes(
    model: nn.Module, ours: Metadata, weights: Weights, given: Mapping[str, Tensor], whole: bool
) -> bool:
    """Whether a head is taken from the file, so that its classes must be the data's."""
    if whole:  # of a file that says nothing, check_network has told
        return bool(given) and bool(weights.metadata or weights.classes)
    same_number = bool(ours.classes) and len(ours.classes) == len(weights.classes or ())
    return same_number and _takes_head(model, given)


def _log_leftovers(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> None:
    if missing := [name for name in own if name not in given and not name.endswith(_COUNT)]:
        logger.warning(get_missing_parameters_message(missing))
    if unexpected := [name for name in state if name not in own]:
        logger.warning(get_unexpected_parameters_message(unexpected))


def load_weights(
    model: nn.Module,
    weights: Weights,
    *,
    whole: bool,
    ours: Metadata | None = None,
    allow_missing: bool = False,
) -> None:
    """Loads what a file has into a model, which stays as it is if anything is wrong.

    Args:
        model: to take the weights.
        weights: of :func:`contnet.checkpoint.reading.read_weights`.
        whole: the file must give every tensor of the model. Otherwise it must give every tensor of
            the backbone (of a classifier: all but its head), and whatever else fits is taken, too.
        ours: facts of the model, to compare with the file's; None to compare nothing.
        allow_missing: accept a file without some of the backbone's tensors.

    Raises:
        UserError: if tensors are missing, have another shape, are damaged or quantised, or were
            trained in a network of another function or on other classes.
    """
    path = weights.path
    if weights.odd:
        raise UserError(
            f"{path} has entries among its tensors that are none ({first_names(weights.odd)}); "
            f"{conversion_advice(path)}"
        )
    if ours is not None:
        check_network(ours, weights.metadata, path, weights.form, whole)
    prefix = "" if whole else _backbone_prefix(model, path)
    own, state = model.state_dict(), _name_as_in(model, weights)
    wanted = [name for name in own if name.startswith(prefix) and not name.endswith(_COUNT)]
    _check_values({name: own[name] for name in wanted}, state, path)
    given = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    if ours is not None and _must_have_classes(model, ours, weights, given, whole):
        check_class_names(model, ours.classes, weights.classes, path)
    if not whole and (head := _head_names(model)):
        wanted = [name for name in wanted if name not in head]
        if any(name not in given for name in head):
            given = {name: value for name, value in given.items() if name not in head}
            logger.info(f"The classifier's head starts from random weights: {first_names(head)}")
    _check_complete(model, weights, wanted, state, given, whole, allow_missing)
    _log_leftovers(own, state, given)
    model.load_state_dict(given, strict=False)
