"""Converts weights between formats, and compares the outputs of source and result."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from torch import Tensor

from contnet.checkpoint.key_mapping import convert_resnet_state_dict, revert_state_dict
from contnet.checkpoint.networks import FORMS, HEADS, Network, head_of
from contnet.checkpoint.reference import RUNNERS
from contnet.modeling.contnet import create_model
from contnet.utils.errors import UserError

__all__ = ["EXPORTS", "TARGETS", "Result", "convert", "largest_difference"]

_SEED = 0
# Format of the result for each choice of --to, by network family.
TARGETS = {
    "detectron2": {"contnet": "contnet", "resnet": "detectron2"},
    "timm": {"contnet": "contnet", "resnet": "timm"},
    "authors": {"contnet": "authors"},
}
# Functions that convert a state dict with the family's own names to each format.
EXPORTS = {
    "contnet": dict,
    "timm": dict,
    "authors": revert_state_dict,
    "detectron2": convert_resnet_state_dict,
}


@dataclass
class Result:
    """Converted weights.

    Attributes:
        form: the format, one of the family's ``FORMS``.
        variant, options: as in :class:`Network`, with the number of classes of the new head.
        tensors: tensors by the format's names.
        mapped: pairs of names in the file and in the result.
        new: names in the result without a tensor in the file.
        left: names in the file of tensors of the network that are not in the result.
    """

    form: str
    variant: str
    options: dict
    tensors: dict[str, Tensor]
    mapped: list[tuple[str, str]]
    new: list[str]
    left: list[str]


def _new_head(network: Network, classes: int) -> dict[str, Tensor]:
    """Returns a head with the network's random initialisation, with a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        if network.family == "contnet":
            model = create_model(network.variant, **{**network.options, "num_classes": classes})
        else:
            model = timm.create_model(network.variant, num_classes=classes)
    return head_of(model.state_dict(), network.family)


def convert(network: Network, to: str, head: str | int) -> Result:
    """Converts a network's weights to another format.

    Args:
        network: the network; it is not changed.
        to: "detectron2", "timm" or "authors".
        head: "keep", "drop", or the number of classes of a new head.

    Raises:
        UserError: if the format does not support this network.
    """
    form = TARGETS[to].get(network.family)
    if form is None:
        raise UserError(f"--to {to} is for ConTNets, but it contains a {network.variant}")
    if form == "timm" and network.stride_in_1x1:
        raise UserError(
            "its strides are in the 1x1 convolutions (MODEL.RESNETS.STRIDE_IN_1X1 True), where "
            "timm's and torchvision's ResNets cannot have them: remove --to timm"
        )
    tensors, fresh = dict(network.tensors), {}
    if head != "keep":
        tensors = {k: v for k, v in tensors.items() if not k.startswith(HEADS[network.family])}
        fresh = _new_head(network, head) if isinstance(head, int) else {}
    options = dict(network.options)
    if head != "keep":
        options["num_classes"] = 0 if head == "drop" else head
    written = EXPORTS[form]({**tensors, **fresh})
    rename = FORMS[network.family][form]
    mapped = [(network.origins[k], rename(k)) for k in tensors if rename(k) in written]
    given = {name for _, name in mapped}
    used = {name for name, _ in mapped}
    return Result(
        form,
        network.variant,
        options,
        written,
        mapped,
        new=[name for name in written if name not in given],
        left=[name for name in network.origins.values() if name not in used],
    )


@torch.no_grad()
def largest_difference(
    network: Network, result: Result, size: tuple[int, int], with_logits: bool
) -> tuple[float, float]:
    """Runs source and result on a random image, each in its own library.

    Args:
        network: the source.
        result: the converted network, read back from the file.
        size: (height, width) of the image, in pixels.
        with_logits: whether to compare the logits too, not only the last map.

    Returns:
        The largest difference, and the largest output of the source.
    """
    generator = torch.Generator().manual_seed(_SEED)
    image = torch.randn(1, network.options.get("in_chans", 3), *size, generator=generator)
    count = 2 if with_logits else 1
    source = RUNNERS[network.form](network.variant, network.options, network.native, image)
    made = RUNNERS[result.form](result.variant, result.options, result.tensors, image)
    pairs = list(zip(source[:count], made[:count], strict=True))
    difference = max((a - b).abs().max().item() for a, b in pairs)
    return difference, max(a.abs().max().item() for a, _ in pairs)
