"""Converts classification checkpoints (the authors' and ResNets) to our key names.

The authors' files are ``{"model": state_dict, ...}`` of a DistributedDataParallel (keys start with
``module.``) or bare state dicts. Their variant and options are found from keys and shapes, except
``pre_norm``, which these do not show: the published default (post-norm) is assumed.

ResNets of torchvision and timm (with the plain stem) are converted to Detectron2's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from contnet.modeling.contnet import VARIANTS, create_model
from contnet.modeling.patches import relative_index

__all__ = [
    "MARKS",
    "ConversionReport",
    "authors_name",
    "convert_resnet_state_dict",
    "convert_state_dict",
    "detectron2_name",
    "locate_networks",
    "revert_state_dict",
    "torchvision_name",
]

# By format: a tensor that all its networks have. "timm" is also torchvision's, "contnet" is ours.
MARKS = {
    "authors": "layer0.conv.conv.weight",
    "contnet": "stem.weight",
    "timm": "layer1.0.conv1.weight",
    "detectron2": "stem.conv1.weight",
}
_BLOCK = re.compile(r"stages\.(\d+)\.(\d+)\.(.+)")
_THEIR_BLOCK = re.compile(r"layer(\d+)\.ConTBlock(\d+)\.")
_INDEX = ".attn.relative_position_index"
# Prefixes of names inside a block, ours and the authors'; only the first match is replaced.
_PARTS = (
    ("norm.", "bn."),
    ("encoders.0.", "ste1."),
    ("encoders.1.", "ste2."),
    ("conv.", "out_conv.conv."),
    ("shortcut.", "downsample.conv."),
)
# Substitutions from torchvision's ResNet names to Detectron2's, in the order of application.
_RESNET = (
    (re.compile(r"^(conv|bn)1\."), r"stem.\g<0>"),
    (re.compile(r"^layer(\d)\."), lambda match: f"res{int(match[1]) + 1}."),
    (re.compile(r"\.bn(\d)\."), r".conv\1.norm."),
    (re.compile(r"\.downsample\.0\."), ".shortcut."),
    (re.compile(r"\.downsample\.1\."), ".shortcut.norm."),
    (re.compile(r"^fc\."), "linear."),
)
_RESNET_BACK = (
    (re.compile(r"\.conv(\d)\.norm\."), r".bn\1."),
    (re.compile(r"^stem\."), ""),
    (re.compile(r"^res(\d)\."), lambda match: f"layer{int(match[1]) - 1}."),
    (re.compile(r"\.shortcut\.norm\."), ".downsample.1."),
    (re.compile(r"\.shortcut\."), ".downsample.0."),
    (re.compile(r"^linear\."), "fc."),
)
_LEAVES = {"row_table": "pe.0", "col_table": "pe.1", "bias_table": "relative_position_bias_table"}


@dataclass
class ConversionReport:
    """A report of what a conversion did with a checkpoint's tensors.

    Attributes:
        mapped: our names by the authors' names.
        dropped: the authors' tensors that our network computes instead of loading.
        missing: the authors' names of tensors that the checkpoint lacks.
        unexpected: names in the checkpoint that the network does not have.
        variant: name for :func:`contnet.create_model`.
        options: keyword arguments of this function, as far as keys and shapes show them.
    """

    mapped: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    variant: str = ""
    options: dict = field(default_factory=dict)


def locate_networks(names: Iterable[str]) -> list[tuple[str, str]]:
    """Returns the format and the prefix of each network with tensors among these names."""
    return [
        (form, name.removesuffix(mark))
        for name in names
        for form, mark in MARKS.items()
        if f".{name}".endswith(f".{mark}")
    ]


def authors_name(ours: str) -> str:
    """Returns the authors' name of a tensor of :func:`contnet.create_model`."""
    if not (match := _BLOCK.fullmatch(ours)):
        return re.sub(r"^stem\.", "layer0.conv.conv.", re.sub(r"^head\.", "fc.", ours))
    stage, block, rest = match.groups()
    for our_part, their_part in _PARTS:
        if rest.startswith(our_part):
            rest = their_part + rest[len(our_part) :]
            break
    head, _, leaf = rest.rpartition(".")
    return f"layer{int(stage) + 1}.ConTBlock{block}.{head}.{_LEAVES.get(leaf, leaf)}"


def _bare(checkpoint: Mapping) -> dict[str, Tensor]:
    state = checkpoint.get("model", checkpoint)
    if not isinstance(state, Mapping) or not state:
        raise ValueError("not a ConTNet checkpoint: it contains no state dict")
    if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"not a ConTNet checkpoint: its entry {odd[0]!r} is not a tensor")
    wrapped = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module."): v for name, v in state.items()} if wrapped else state


def _variant_of(state: Mapping[str, Tensor]) -> str:
    stem = state.get("layer0.conv.conv.weight")
    if stem is None:
        raise ValueError(
            "not a checkpoint of the authors' ConTNet: it has no layer0.conv.conv.weight, "
            f"its first entry is {next(iter(state))!r}"
        )
    blocks = {m.groups() for name in state if (m := _THEIR_BLOCK.match(name))}
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(1, 5))
    for name, facts in VARIANTS.items():
        if facts["depths"] == depths and facts["dim"] == stem.shape[0]:
            return name
    raise ValueError(
        f"no ConTNet variant has {stem.shape[0]} stem channels and {depths} blocks per stage"
    )


def _options_of(state: Mapping[str, Tensor]) -> dict:
    head = state.get("fc.weight")
    first = "layer1.ConTBlock0.ste1.attn."
    return {
        "num_classes": 0 if head is None else head.shape[0],
        "in_chans": state["layer0.conv.conv.weight"].shape[1],
        "relative": first + "relative_position_bias_table" in state,
        "use_avgdown": any(name.endswith("downsample.conv.conv.weight") for name in state),
        "qkv_bias": first + "qkv.bias" in state,
    }


def _said_of(checkpoint: Mapping) -> dict:
    """Returns the option ``pre_norm`` in the metadata of a file, as tensors do not show it."""
    said = checkpoint.get("contnet")
    options = said.get("options") if isinstance(said, Mapping) else None
    given = options.get("pre_norm") if isinstance(options, Mapping) else None
    # The first version, without a format number, wrote False even if it was unknown.
    known = isinstance(given, bool) and (given or "format" in said)
    return {"pre_norm": given} if known else {}


def convert_state_dict(checkpoint: Mapping) -> tuple[dict[str, Tensor], ConversionReport]:
    """Converts a checkpoint of the authors' code to our names.

    Args:
        checkpoint: a state dict, or a dict that has one under ``model``; names may start with
            ``module.``. It is not changed.

    Returns:
        The state dict for ``create_model(report.variant, **report.options)``, which loads it
        strictly if at most the head is missing, and the report.

    Raises:
        ValueError: if it is not a ConTNet checkpoint, or a tensor has a wrong shape.
    """
    state = _bare(checkpoint)
    report = ConversionReport(variant=_variant_of(state), options=_options_of(state))
    report.options |= _said_of(checkpoint)
    with torch.device("meta"):
        whole = create_model(report.variant, **{**report.options, "num_classes": 1})
    converted = {}
    for ours, expected in whole.state_dict().items():
        theirs = authors_name(ours)
        if theirs not in state:
            report.missing.append(theirs)
            continue
        if not ours.startswith("head.") and state[theirs].shape != expected.shape:
            raise ValueError(
                f"{theirs} has shape {tuple(state[theirs].shape)}, "
                f"{report.variant} needs {tuple(expected.shape)}"
            )
        converted[ours] = state[theirs]
        report.mapped[theirs] = ours
    rest = [name for name in state if name not in report.mapped]
    report.dropped = [name for name in rest if name.endswith(_INDEX)]
    report.unexpected = [name for name in rest if not name.endswith(_INDEX)]
    return converted, report


def revert_state_dict(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts our state dict back to the authors' names (without ``module.``).

    Raises:
        ValueError: if it is not a state dict of our ConTNet.
    """
    if "stem.weight" not in ours:
        raise ValueError("not a state dict of contnet.create_model: it has no stem.weight")
    theirs = {}
    for name, value in ours.items():
        theirs[authors_name(name)] = value
        if name.endswith(".bias_table"):
            patch_size = (int(value.shape[0] ** 0.5) + 1) // 2
            encoder = authors_name(name).removesuffix(".attn.relative_position_bias_table")
            # The authors order tokens row by row, as with cells of one pixel.
            theirs[encoder + _INDEX] = relative_index(patch_size, 1).to(value.device)
    return theirs


def detectron2_name(name: str) -> str:
    """Converts torchvision's name of a ResNet's tensor to Detectron2's."""
    for pattern, replacement in _RESNET:
        name = pattern.sub(replacement, name)
    return name


def torchvision_name(name: str) -> str:
    """Converts Detectron2's name of a ResNet's tensor to torchvision's."""
    for pattern, replacement in _RESNET_BACK:
        name = pattern.sub(replacement, name)
    return name


def convert_resnet_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts a ResNet of torchvision or timm to Detectron2's names.

    Args:
        state: state dict of the ResNet, which is not changed.

    Returns:
        The tensors without ``num_batches_tracked``, which Detectron2's frozen norms do not have;
        the head is called ``linear``.

    Raises:
        ValueError: if it is not a ResNet with these names, or has another stem.
    """
    stem = state.get("conv1.weight")
    if MARKS["timm"] not in state or stem is None or stem.shape[-2:] != (7, 7):
        raise ValueError("not a ResNet like torchvision's: it has no conv1.weight of 7x7")
    counts = ".num_batches_tracked"
    return {detectron2_name(k): v for k, v in state.items() if not k.endswith(counts)}
