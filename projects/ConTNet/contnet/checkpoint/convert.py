"""Weights of one form turned into another, and the two compared by what they compute."""

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
# The form that each choice of --to gives, by family of networks.
TARGETS = {
    "detectron2": {"contnet": "contnet", "resnet": "detectron2"},
    "timm": {"contnet": "contnet", "resnet": "timm"},
    "authors": {"contnet": "authors"},
}
# Gives a state the names of a form.
EXPORTS = {
    "contnet": dict,
    "timm": dict,
    "authors": revert_state_dict,
    "detectron2": convert_resnet_state_dict,
}


@dataclass
class Result:
    """Weights in the form asked for.

    Attributes:
        form: one of the family's ``FORMS``.
        variant, options: as those of :class:`Network`, with the new head's classes.
        tensors: by the form's names.
        mapped: names in the file beside names in the result.
        new: names in the result that no tensor of the file gave.
        left: names in the file of tensors of the network that the result does without.
    """

    form: str
    variant: str
    options: dict
    tensors: dict[str, Tensor]
    mapped: list[tuple[str, str]]
    new: list[str]
    left: list[str]


def _new_head(network: Network, classes: int) -> dict[str, Tensor]:
    """A random head, always the same one, as the network's own initialisation makes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        if network.family == "contnet":
            model = create_model(network.variant, **{**network.options, "num_classes": classes})
        else:
            model = timm.create_model(network.variant, num_classes=classes)
    return head_of(model.state_dict(), network.family)


def convert(network: Network, to: str, head: str | int) -> Result:
    """Brings a network's weights into another form.

    Args:
        network: is left as it is.
        to: "detectron2", "timm" or "authors".
        head: "keep", "drop", or the number of classes of a new one.

    Raises:
        UserError: if there is no such form of this network.
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
    """Runs source and result on a random image, each by its own names in its own library.

    Args:
        network: the source.
        result: what became of it, as read back.
        size: (height, width) of the image, in pixels.
        with_logits: compare the logits too, not the last map alone.

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
