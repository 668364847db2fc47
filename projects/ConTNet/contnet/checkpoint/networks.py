"""Finds the network in a weight file: its variant, naming scheme and options."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import timm
import torch
from torch import Tensor

from contnet.checkpoint.key_mapping import (
    MARKS,
    authors_name,
    convert_state_dict,
    detectron2_name,
    locate_networks,
    revert_state_dict,
    torchvision_name,
)
from contnet.checkpoint.metadata import RESNET_OPTIONS
from contnet.checkpoint.reading import NUM_AVERAGED, Weights
from contnet.modeling.contnet import create_model
from contnet.utils.errors import UserError
from contnet.utils.text import first_names, printable

__all__ = ["FORMS", "HEADS", "Network", "find_network", "head_of"]

# Formats of each family, with functions from the family's own names (those of its first format).
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


@dataclass
class Network:
    """A network's weights in a file.

    Attributes:
        family: "contnet" or "resnet".
        form: naming scheme of the file, one of ``FORMS[family]``.
        variant: name for :func:`contnet.create_model` or ``timm.create_model``.
        options: keyword arguments of this function.
        native: tensors by the names of ``form``.
        tensors: tensors by the family's own names, those of its first form.
        origins: names in the file by the family's own names.
        dropped: names in the file that do not belong to the network.
        missing: the family's own names of tensors that the file lacks, at most the head.
        stride_in_1x1: for a ResNet, as MODEL.RESNETS.STRIDE_IN_1X1; None if it is unknown.
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
    stride_in_1x1: bool | None = None


def head_of(tensors: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Returns the classifier's tensors, by the family's own names; empty if there is none."""
    return {name: value for name, value in tensors.items() if name.startswith(HEADS[family])}


def _check_single(weights: Weights) -> None:
    """Raises UserError unless there is exactly one network in a known format."""
    found = locate_networks(weights.tensors)
    if not found:
        first = next(iter(weights.tensors))
        raise UserError(
            "it contains neither a ConTNet nor a ResNet, its first tensor is "
            f"{printable(first, 200)}"
        )
    if len(found) > 1:
        names = ", ".join(prefix + MARKS[form] for form, prefix in found)
        raise UserError(
            f"it contains several networks ({names}): keep only one of them in the file"
        )


def _pre_norm_of(weights: Weights, asked: bool | None) -> bool:
    """Returns a ConTNet's pre_norm from the file or the user, because no tensor shows it."""
    said = weights.metadata.options.get("pre_norm") if weights.metadata else None
    if said is None and asked is None:
        raise UserError(
            "it does not show whether its ConTNet was trained with pre_norm: add --pre-norm or "
            "--no-pre-norm (the default of the authors and of this package)"
        )
    if said is not None and asked is not None and said != asked:
        raise UserError(f"its metadata say that its ConTNet has pre_norm {said}: remove the option")
    return said if asked is None else asked


def _check_said(network: Network, weights: Weights) -> None:
    """Rejects a file whose tensors do not match its metadata."""
    said = weights.metadata.options if weights.metadata else {}
    if network.family == "resnet":
        # Tensors do not show all options, for example the activation.
        if unknown := sorted(said.keys() - RESNET_OPTIONS):
            option = printable(f"{unknown[0]} {said[unknown[0]]!r}", 200)
            raise UserError(f"its {network.variant} has {option}: this option cannot be converted")
        return
    if weights.metadata is None:
        return
    found = {"network": network.variant, **network.options}
    said = {"network": weights.metadata.network, **said}
    for name in ("network", "in_chans", "relative", "use_avgdown", "qkv_bias"):
        if name in found and said.get(name, found[name]) != found[name]:
            raise UserError(
                f"its metadata say {name} {said[name]}, but its tensors have {found[name]}: "
                "do not use this file"
            )


def _check_shapes(network: Network, expected: Mapping[str, Tensor]) -> None:
    """Sets ``network.missing``, and checks the shapes and values of the other tensors.

    Raises:
        UserError: if more than the head is missing, or a tensor has another shape, is quantised
            or not finite.
    """
    absent = [k for k in expected if k not in network.tensors and not k.endswith(_COUNT)]
    network.missing = [name for name in absent if name.startswith(HEADS[network.family])]
    lacking = [name for name in absent if name not in network.missing]
    if lacking and all(name.endswith(("running_mean", "running_var")) for name in lacking):
        raise UserError(
            f"its {network.variant} has no running statistics, as with GroupNorm: use the file "
            "unchanged as MODEL.WEIGHTS of a detector with the same norm"
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
            raise UserError(f"{network.origins[name]} is {value.dtype}: it is quantised")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{network.origins[name]} is not finite: the training had diverged")


def _classes(head: Mapping[str, Tensor]) -> int:
    """Returns the number of classes of a head; 0 if there is none."""
    return next((len(value) for value in head.values() if value.ndim), 0)


def _find_contnet(form: str, native: dict[str, Tensor]) -> Network:
    try:
        theirs = native if form == "authors" else revert_state_dict(native)
        tensors, report = convert_state_dict(theirs)
    except ValueError as error:
        message = str(error)
        for ours in native if form == "contnet" else ():
            message = message.replace(authors_name(ours), ours)
        raise UserError(message) from error
    options = dict(report.options)
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
    """Returns the number of classes of the network for comparison, which always has a head."""
    return options["num_classes"] or 1


def _resnet_variant(tensors: Mapping[str, Tensor]) -> str:
    blocks = {m.groups() for k in tensors if (m := re.match(r"layer(\d)\.(\d+)\.", k))}
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(1, 5))
    variant = _RESNETS.get(("layer1.0.conv3.weight" in tensors, depths))
    stem = tensors.get("conv1.weight")
    if stem is None or stem.shape[-2:] != (7, 7):
        raise UserError("not a ResNet like torchvision's: it has no conv1.weight of 7x7")
    if variant is None:
        raise UserError(f"no torchvision ResNet has {depths} blocks per stage")
    return variant


def _find_resnet(form: str, native: dict[str, Tensor]) -> Network:
    rename = torchvision_name if form == "detectron2" else str
    origins = {rename(name): name for name in native}
    tensors = {ours: native[name] for ours, name in origins.items()}
    options = {"num_classes": _classes(head_of(tensors, "resnet"))}
    variant = _resnet_variant(tensors)
    with torch.device("meta"):
        whole = timm.create_model(variant, num_classes=_whole_head(options)).state_dict()
    # Extra tensors, such as those of squeeze-and-excitation, mean another architecture.
    if extra := [origins[name] for name in tensors if name not in whole]:
        raise UserError(f"not a plain {variant}, which has no {first_names(extra)}")
    network = Network(
        "resnet", form, variant, options, native, tensors, origins, dropped=[], missing=[]
    )
    _check_shapes(network, whole)
    return network


def find_network(weights: Weights, pre_norm: bool | None = None) -> Network:
    """Finds the network in a file: a classifier's, or a detector's backbone.

    Args:
        weights: weights in any of the naming schemes.
        pre_norm: option of a ConTNet, which its tensors do not show; None if the file contains it.

    Raises:
        UserError: if there is no network, more than one, an incomplete one, or another one than in
            the file's metadata. The message does not name the file.
    """
    _check_single(weights)
    form, native = weights.form, weights.network_tensors()
    native.pop(NUM_AVERAGED, None)
    if form in FORMS["contnet"]:
        network = _find_contnet(form, native)
        network.options["pre_norm"] = _pre_norm_of(weights, pre_norm)
    elif pre_norm is not None:
        raise UserError("--pre-norm is an option of ConTNet, but this is a ResNet")
    else:
        network = _find_resnet(form, native)
        said = weights.metadata.options if weights.metadata else {}
        # ResNets of torchvision and timm never have strides in the 1x1 convolutions.
        network.stride_in_1x1 = False if form == "timm" else said.get("stride_in_1x1")
    _check_said(network, weights)
    names = {ours: weights.prefix + name for ours, name in network.origins.items()}
    used = set(names.values())
    network.origins = {ours: weights.origins[name] for ours, name in names.items()}
    unused = [origin for name, origin in weights.origins.items() if name not in used]
    network.dropped = unused + weights.odd
    if form != "authors":  # its runner also loads the file's index buffers
        network.native = {k: v for k, v in native.items() if weights.prefix + k in used}
    return network
