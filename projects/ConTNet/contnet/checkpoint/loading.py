"""Loads weights into a model: converts names, checks metadata and values, then loads all."""

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

from contnet.checkpoint.detectors import translate_detector
from contnet.checkpoint.heads import class_rows, compare_names, match_rows
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
from contnet.utils.text import first_names, printable

__all__ = ["load_weights"]

logger = logging.getLogger(__name__)

_HEADS = ("head.", "fc.", "linear.")
_COUNT = "num_batches_tracked"


# --- names ---------------------------------------------------------------------------------------


def _convert_authors(state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    converted, report = convert_state_dict(state)
    if left := report.unexpected:
        logger.warning(
            f"{path}: {len(left)} tensors do not belong to a ConTNet and are ignored "
            f"({first_names(left)})"
        )
    return converted


def _network_in_form(weights: Weights, form: str) -> dict[str, Tensor]:
    """Renames a file's network to another format; unchanged if it is of another family."""
    state = weights.network_tensors()
    if (weights.form, form) == ("authors", "contnet"):
        return _convert_authors(state, weights.path)
    if (weights.form, form) == ("timm", "detectron2"):
        return convert_resnet_state_dict(state)
    if (weights.form, form) == ("detectron2", "timm"):
        return {torchvision_name(name): value for name, value in state.items()}
    return state


def _translated_parts(model: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """Returns pyramid and heads of another library's detector, with Detectron2's names."""
    if not weights.origin.detector or isinstance(model, ImageClassifier | ConTNet):
        return {}
    rest = {
        name: value
        for name, value in weights.tensors.items()
        if not weights.form or not name.startswith(weights.prefix)
    }
    made, left = translate_detector(rest, weights.origin.detector)
    if ("head.scales" in made) != ("head.scales" in model.state_dict()):
        # Only one of the two FCOS heads has scales, so these parts compute something else.
        for part in ("head.bbox_pred", "head.ctrness"):
            left += [f"{part} of FCOS"] if made.pop(f"{part}.weight", None) is not None else []
            made.pop(f"{part}.bias", None)
    line = (
        f"{weights.path} is a detector of {weights.origin.maker}: {len(made)} tensors of its "
        "pyramid and heads are converted"
    )
    if left:
        line += f", {len(left)} have no counterpart here and are ignored ({first_names(left)})"
    logger.info(line)
    return made


def _name_as_in(model: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """Returns a file's tensors with a model's names.

    Raises:
        UserError: if its network cannot be converted.
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
    named = {
        prefix + name: value
        for name, value in network.items()
        if prefix + name in own or not name.startswith(_HEADS)
    }
    return named | _translated_parts(model, weights)


# --- values --------------------------------------------------------------------------------------


def _check_values(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str) -> None:
    """Rejects damaged and quantised weights, which would load silently."""
    for name, expected in own.items():
        if name not in state or not expected.is_floating_point():
            continue
        value = state[name]
        if not value.is_floating_point():
            raise UserError(
                f"{path}: {name} is {value.dtype}, as in quantised weights, where "
                f"{expected.dtype} is required: use weights that are not quantised"
            )
        if not value.isfinite().all():
            raise UserError(
                f"{path}: {name} is not finite: the file is damaged, or its training "
                "diverged; use an earlier checkpoint, or copy the file again"
            )


def _frozen_statistics(model: nn.Module) -> set[str]:
    """Returns the names of statistics that FrozenBN sets itself if a file lacks them."""
    return {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, FrozenBatchNorm2d)
        for leaf in ("running_mean", "running_var")
    }


def _head_names(model: nn.Module) -> list[str]:
    """Returns the full names of a classifier's head tensors; empty for a detector."""
    return list(class_rows(model)) if isinstance(model, ImageClassifier | ConTNet) else []


def _advice(
    model: nn.Module, weights: Weights, absent: list[str], misshapen: list[str], whole: bool
) -> str:
    if not whole:
        return (
            "use weights of exactly this backbone (variant and options), or allow it with "
            f"MODEL.ALLOW_MISSING_WEIGHTS True; {conversion_advice(weights.path)}"
        )
    if not absent and set(misshapen) <= set(_head_names(model)):
        return "its head has another number of classes than MODEL.CLASSIFIER.NUM_CLASSES"
    if not absent:
        return "it is a checkpoint of another architecture, or of another number of classes"
    first = next(iter(weights.tensors))
    return (
        f"it is a checkpoint of another architecture, its first tensor is {printable(first, 200)}"
    )


def _check_complete(
    model: nn.Module,
    weights: Weights,
    wanted: Sequence[str],
    state: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    whole: bool,
    allow_missing: bool,
) -> None:
    """Logs how many of the required tensors the file has; raises an error unless it has all."""
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


# --- loading -------------------------------------------------------------------------------------


def _backbone_prefix(model: nn.Module, path: str) -> str:
    try:
        return backbone_prefix(model)
    except ValueError as error:
        raise UserError(f"{path} cannot initialise this model: {error}") from error


def _takes_head(given: Mapping[str, Tensor]) -> bool:
    """Whether the matching tensors include parts that depend on the classes."""
    # Pyramids and proposal generators do not depend on classes.
    return any(not name.startswith(("backbone.", "proposal_generator.")) for name in given)


def _fit_head(
    model: nn.Module,
    weights: Weights,
    ours: Metadata | None,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
) -> Mapping[str, Tensor]:
    """Returns the tensors to load, with the head's rows chosen by class names."""
    rows, path = class_rows(model), weights.path
    names, theirs = ours.classes if ours is not None else None, weights.classes
    rest = {name: value for name, value in given.items() if name not in rows}
    differ = bool(names and theirs) and list(names) != list(theirs)
    if differ and any(name in state for name in rows):
        logger.info(compare_names(names, theirs, path))
        return rest | match_rows(rows, own, state, names, theirs)
    if differ and not rows and len(names) == len(theirs) and _takes_head(given):
        check_class_names(model, names, theirs, weights)  # the layout of its rows is unknown
    if any(name not in given for name in _head_names(model)):
        logger.info(f"The classifier's head starts from random weights: {first_names(list(rows))}")
        return rest
    kept = any(name in given for name in rows)
    if kept and ours is not None and not isinstance(model, ConTNet):
        check_class_names(model, names, theirs, weights)
    return given


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
    subset: bool = False,
) -> None:
    """Loads weights into a model, which is not changed if there is an error.

    Unless ``whole`` is set, a head for other classes gets the rows of classes with the same name.

    Args:
        model: the model.
        weights: from :func:`contnet.checkpoint.reading.read_weights`.
        whole: whether the file must have every tensor of the model. Otherwise, it must have every
            tensor of the backbone (of a classifier: all but its head), and other tensors are loaded
            if they fit.
        ours: metadata of the model, compared with the file's; None to compare nothing.
        allow_missing: whether to accept a file without some of the backbone's tensors.
        subset: whether to accept a whole file that has more classes than ``ours``.

    Raises:
        UserError: if tensors are missing, have another shape, are damaged or quantised, or were
            trained in a network that computes something else, or on other classes.
    """
    path = weights.path
    if weights.odd:
        raise UserError(
            f"{path} has entries among its tensors that are not tensors "
            f"({first_names(weights.odd)}); {conversion_advice(path)}"
        )
    if ours is not None:
        check_network(ours, weights, whole)
    prefix = "" if whole else _backbone_prefix(model, path)
    own, state = model.state_dict(), _name_as_in(model, weights)
    wanted = [name for name in own if name.startswith(prefix) and not name.endswith(_COUNT)]
    given = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    if not whole:
        given = _fit_head(model, weights, ours, own, state, given)
        wanted = [name for name in wanted if name not in _head_names(model)]
    elif given and ours is not None and (weights.metadata or weights.classes):
        # Without metadata and class names, only check_network gives warnings.
        check_class_names(model, ours.classes, weights.classes, weights, subset)
    _check_values({name: own[name] for name in (*wanted, *given)}, {**state, **given}, path)
    _check_complete(model, weights, wanted, state, given, whole, allow_missing)
    _log_leftovers(own, state, given)
    model.load_state_dict(given, strict=False)
