"""Finds the network that a file of weights holds: which one, in whose names, and what else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import timm
import torch
from torch import Tensor

from contnet.checkpoint.key_mapping import (
    authors_name,
    convert_state_dict,
    detectron2_name,
    revert_state_dict,
    torchvision_name,
)
from contnet.checkpoint.reading import strip_wrapper_prefix
from contnet.modeling.contnet import create_model
from contnet.utils.errors import UserError
from contnet.utils.text import first_names

__all__ = ["FORMS", "HEADS", "Network", "find_network", "head_of"]

# One tensor that every network of a form has. "timm" is torchvision's too.
_MARKS = {
    "authors": "layer0.conv.conv.weight",
    "contnet": "stem.weight",
    "timm": "layer1.0.conv1.weight",
    "detectron2": "stem.conv1.weight",
}
# By family: its forms, each with the function from the family's own names (the first form's).
FORMS: dict[str, dict[str, Callable[[str], str]]] = {
    "contnet": {"contnet": str, "authors": authors_name},
    "resnet": {"timm": str, "detectron2": detectron2_name},
}
HEADS = {"contnet": "head.", "resnet": "fc."}
_RESNETS = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
_COUNT = ".num_batches_tracked"
# How many weights PyTorch's AveragedModel has averaged, beside them.
_NUM_AVERAGED = "n_averaged"


@dataclass
class Network:
    """A network's weights as a file gives them.

    Attributes:
        family: "contnet" or "resnet".
        form: whose names the file has, one of ``FORMS[family]``.
        variant: name for :func:`contnet.create_model` or ``timm.create_model``.
        options: its keyword arguments.
        native: tensors by the form's names.
        tensors: the same by the family's own names, those of its first form.
        origins: names in the file by the family's own names.
        dropped: names in the file of what is no part of the network.
        missing: the family's own names of what the file lacks, at most the head.
    """

    family: str
    form: str
    variant: str
    options: dict
    native: dict[str, Tensor]
    tensors: dict[str, Tensor]
    origins: dict[str, str]
    dropped: list[str]
    missing: list[str]


def head_of(tensors: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """The classifier's tensors, by the family's own names; empty where there is none."""
    return {name: value for name, value in tensors.items() if name.startswith(HEADS[family])}


def _locate(state: Mapping[str, Tensor]) -> tuple[str, str]:
    """Form and prefix of the one network in a state dict."""
    found = [
        (form, name.removesuffix(mark))
        for form, mark in _MARKS.items()
        for name in state
        if f".{name}".endswith(f".{mark}")
    ]
    if not found:
        first = f", its first tensor is {next(iter(state))!r}" if state else ""
        raise UserError(f"it holds neither a ConTNet nor a ResNet{first}")
    if len(found) > 1:
        names = ", ".join(prefix + _MARKS[form] for form, prefix in found)
        raise UserError(f"it holds several networks ({names}): leave one of them in the file")
    return found[0]


def _check_shapes(network: Network, expected: Mapping[str, Tensor]) -> None:
    """What is missing, and whether what is there has the network's shapes.

    Raises:
        UserError: if more than the head is missing, or a tensor has another shape.
    """
    absent = [k for k in expected if k not in network.tensors and not k.endswith(_COUNT)]
    network.missing = [name for name in absent if name.startswith(HEADS[network.family])]
    lacking = [name for name in absent if name not in network.missing]
    if lacking and all(name.endswith(("running_mean", "running_var")) for name in lacking):
        raise UserError(
            f"its {network.variant} has no running statistics, as with GroupNorm: give the file to "
            "MODEL.WEIGHTS of a detector with the same norm as it is"
        )
    if lacking or len(network.missing) == 1:
        raise UserError(
            f"its {network.variant} lacks {len(lacking or absent)} of {len(expected)} tensors: "
            f"{first_names(lacking or absent)}"
        )
    for name, value in network.tensors.items():
        if value.shape != expected[name].shape:
            raise UserError(
                f"{network.origins[name]} has shape {tuple(value.shape)}, {network.variant} needs "
                f"{tuple(expected[name].shape)}"
            )
        if expected[name].is_floating_point() and not value.is_floating_point():
            raise UserError(f"{network.origins[name]} holds {value.dtype}: it is quantised")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{network.origins[name]} is not finite: the training had diverged")


def _classes(head: Mapping[str, Tensor]) -> int:
    """Classes of a head; 0 where there is none."""
    return next((len(value) for value in head.values() if value.ndim), 0)


def _find_contnet(form: str, native: dict[str, Tensor], pre_norm: bool) -> Network:
    try:
        theirs = native if form == "authors" else revert_state_dict(native)
        tensors, report = convert_state_dict(theirs)
    except ValueError as error:
        message = str(error)
        for ours in native if form == "contnet" else ():
            message = message.replace(authors_name(ours), ours)
        raise UserError(message) from error
    options = {**report.options, "pre_norm": pre_norm}
    options["num_classes"] = _classes(head_of(tensors, "contnet"))
    name = FORMS["contnet"][form]
    origins = {ours: name(ours) for ours in tensors}
    network = Network(
        "contnet", form, report.variant, options, native, tensors, origins, dropped=[], missing=[]
    )
    with torch.device("meta"):
        whole = create_model(report.variant, **{**options, "num_classes": _whole_head(options)})
    _check_shapes(network, whole.state_dict())
    return network


def _whole_head(options: dict) -> int:
    """Classes of the network that the file is compared with, which has a head in any case."""
    return options["num_classes"] or 1


def _resnet_variant(tensors: Mapping[str, Tensor]) -> str:
    blocks = {m.groups() for k in tensors if (m := re.match(r"layer(\d)\.(\d+)\.", k))}
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(1, 5))
    variant = _RESNETS.get(("layer1.0.conv3.weight" in tensors, depths))
    stem = tensors.get("conv1.weight")
    if stem is None or stem.shape[-2:] != (7, 7):
        raise UserError("not a ResNet of torchvision's form: it has no conv1.weight of 7x7")
    if variant is None:
        raise UserError(f"no ResNet of torchvision's has {depths} blocks per stage")
    return variant


def _find_resnet(form: str, native: dict[str, Tensor], pre_norm: bool) -> Network:
    if pre_norm:
        raise UserError("--pre-norm is an option of ConTNet, and this is a ResNet")
    rename = torchvision_name if form == "detectron2" else str
    origins = {rename(name): name for name in native}
    tensors = {ours: native[name] for ours, name in origins.items()}
    options = {"num_classes": _classes(head_of(tensors, "resnet"))}
    variant = _resnet_variant(tensors)
    with torch.device("meta"):
        whole = timm.create_model(variant, num_classes=_whole_head(options)).state_dict()
    # An extra tensor, as that of a squeeze-and-excitation, means another function.
    if extra := [origins[name] for name in tensors if name not in whole]:
        raise UserError(f"no plain {variant}, which has no {first_names(extra)}")
    network = Network(
        "resnet", form, variant, options, native, tensors, origins, dropped=[], missing=[]
    )
    _check_shapes(network, whole)
    return network


def find_network(state: Mapping, pre_norm: bool = False) -> Network:
    """Finds the network in a state dict: a classifier's, or a detector's backbone.

    Args:
        state: of any of the forms, also behind ``module.``, ``network.``, ``backbone.`` and the
            like.
        pre_norm: of a ConTNet, which its weights do not show.

    Raises:
        UserError: if there is none, more than one, or one that is not whole. The message does not
            name the file.
    """
    bare, odd = {}, []
    for name, value in state.items():
        short = strip_wrapper_prefix(str(name))
        if not isinstance(value, Tensor) or short == _NUM_AVERAGED:
            odd.append(str(name))
        elif short in bare:
            raise UserError(f"it holds {short!r} twice, with and without a wrapper's prefix")
        else:
            bare[short] = (str(name), value)
    form, prefix = _locate(bare)
    inside = {k.removeprefix(prefix): pair for k, pair in bare.items() if k.startswith(prefix)}
    native = {short: value for short, (_, value) in inside.items()}
    find = _find_resnet if form in FORMS["resnet"] else _find_contnet
    network = find(form, native, pre_norm)
    network.origins = {ours: inside[name][0] for ours, name in network.origins.items()}
    used = set(network.origins.values())
    network.dropped = [name for name, _ in bare.values() if name not in used] + odd
    if form != "authors":  # whose run looks up what it needs, the file's own index buffers too
        network.native = {k: v for k, v in native.items() if inside[k][0] in used}
    return network
