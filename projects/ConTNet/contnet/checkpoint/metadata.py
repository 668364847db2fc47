"""Metadata of checkpoints, which must match a model before it loads the weights.

Tensors do not show everything that a network's function depends on: ``pre_norm``, for example,
does not change names and shapes. All checkpoints and converted files have metadata under the key
"contnet".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import msgspec
from detectron2.config import CfgNode
from torch import nn

from contnet.checkpoint.origins import Origin
from contnet.modeling.classifier import ImageClassifier, classifier_name, contnet_options
from contnet.modeling.contnet import VARIANTS
from contnet.modeling.fpn import bottom_up_name
from contnet.utils.errors import UserError
from contnet.utils.packages import installed_versions
from contnet.utils.text import describe_difference, printable

__all__ = [
    "METADATA",
    "RESNET_OPTIONS",
    "Metadata",
    "check_class_names",
    "check_network",
    "describe_model",
]

# Key in a checkpoint, or in the metadata of a .safetensors file.
METADATA = "contnet"
_FORMAT = 1
_DAMAGED = (AttributeError, RecursionError, TypeError, ValueError)

# Options that change the function, most of which do not change names and shapes.
_DECISIVE = {
    "relative": "MODEL.CONTNET.RELATIVE",
    "pre_norm": "MODEL.CONTNET.PRE_NORM",
    "use_avgdown": "MODEL.CONTNET.USE_AVGDOWN",
    "qkv_bias": "MODEL.CONTNET.QKV_BIAS",
    "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
}
_STRIDE = "stride_in_1x1"
_PIXEL_KEYS = {
    "format": "INPUT.FORMAT",
    "mean": "MODEL.PIXEL_MEAN",
    "std": "MODEL.PIXEL_STD",
}
_DILATED_PATCHES = "MODEL.CONTNET.DILATED_PATCHES"
# Options that only some models have, or that do not concern weights.
_OTHERS = {
    "dilated_patches": bool,
    "output_stride": int,
    "taps": str,
    "num_groups": int,
    "width_per_group": int,
    "num_classes": int,
    "in_chans": int,
    "drop_rate": float,
    "last_drop_rate": float,
    "drop_path_rate": float,
}
# Options of ResNets.
RESNET_OPTIONS = {
    "stride_in_1x1",
    "output_stride",
    "num_groups",
    "width_per_group",
    "num_classes",
    "in_chans",
}
_KINDS = {**dict.fromkeys(_DECISIVE, bool), **_OTHERS}
# Options that may change when weights are trained further, at some loss of accuracy.
_ADVISABLE = ("taps", "output_stride")
_PLAIN_RESNET = re.compile(r"resnet\d+")
# Norms that compute the same function with the same statistics.
_BATCH_NORMS = ("BN", "FrozenBN", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")

# Types that JSON supports.
Option = bool | int | float | str | list | dict | None


@dataclass(frozen=True)
class Metadata:
    """Facts about weights.

    Attributes:
        network: name of the backbone or of the classifier's network, such as "contnet_m".
        options: options of the network, for a ConTNet arguments of :func:`contnet.create_model`.
        norm: norm of the backbone, as in MODEL.CONTNET.NORM; "" if it is unknown.
        classes: names of the head's classes, in order; None if they are unknown.
        pixels: "format", "mean" and "std" of the network's input channels.
        config: the config of the run, as yaml; "" for a file that was not written by a run.
        versions: versions of the packages that wrote the file; empty if they are unknown.
        conversion: for a converted file: its format, and the name, SHA-256 and key of its source.
        format: version of the metadata format.
    """

    network: str
    options: dict[str, Option] = field(default_factory=dict)
    norm: str = ""
    classes: list[str] | None = None
    pixels: dict[str, str | list[float]] = field(default_factory=dict)
    config: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    conversion: dict[str, str] = field(default_factory=dict)
    format: int = _FORMAT

    def state(self) -> dict:
        """Returns plain values, for a file."""
        return asdict(self)

    @classmethod
    def read(cls, said: object, path: str) -> Metadata | None:
        """Reads the metadata of a file; returns None if it has none.

        Args:
            said: the file's entry ``METADATA``.
            path: path of the file, for messages.

        Raises:
            UserError: if the metadata have another format, or are damaged.
        """
        if said is None or (isinstance(said, Mapping) and not said):
            return None
        try:
            if not isinstance(said, Mapping):
                raise TypeError(f"a {type(said).__name__} instead of a dict")
            written = said.get("format", _FORMAT)
            if isinstance(written, int) and written != _FORMAT:
                raise UserError(
                    f"{path} has format {written}, this version reads {_FORMAT}: use the version "
                    "of contnet that wrote it, or a later one"
                )
            found = msgspec.convert(said if "format" in said else _upgrade(said), cls)
            for name in found.options.keys() & _KINDS.keys():
                msgspec.convert(found.options[name], _KINDS[name])
        except (msgspec.ValidationError, *_DAMAGED) as error:
            reason = printable(str(error), 200)
            raise UserError(
                f"{path}: its metadata under {METADATA!r} are damaged ({reason})"
            ) from error
        return found


class _Weights(Protocol):
    """The attributes of :class:`contnet.checkpoint.reading.Weights` that are compared."""

    path: str
    form: str
    metadata: Metadata | None
    origin: Origin

    def warn(self, line: str) -> None: ...


def _upgrade(said: Mapping) -> dict:
    """Upgrades the metadata of the first version of tools/convert_weights.py."""
    options = dict(said.get("options") or {})
    if options.get("pre_norm") is not True:  # False was assumed if it was unknown
        options.pop("pre_norm", None)
    return {"network": said.get("variant"), "options": options, "classes": said.get("classes")}


# --- from a config -------------------------------------------------------------------------------


def _contnet_facts(variant: str, cfg: CfgNode) -> dict:
    drops = {"drop_rate": 0.0, "last_drop_rate": 0.0}
    drops = {name: VARIANTS[variant].get(name, rate) for name, rate in drops.items()}
    return {"in_chans": len(cfg.MODEL.PIXEL_MEAN), **drops, **contnet_options(cfg)}


def _describe_classifier(cfg: CfgNode) -> dict:
    node, name = cfg.MODEL.CLASSIFIER, classifier_name(cfg)
    if name in VARIANTS:
        options = {**_contnet_facts(name, cfg), "num_classes": node.NUM_CLASSES}
        return {"network": name, "options": options, "norm": "BN"}
    options = {**dict(node.OPTIONS), "num_classes": node.NUM_CLASSES}
    if _PLAIN_RESNET.fullmatch(name):
        options["stride_in_1x1"] = False  # timm has no such option
    return {"network": name, "options": options}


def _resnet_name(depth: int, groups: int, width: int) -> str:
    """Returns timm's name of a Detectron2 ResNet."""
    if groups > 1:
        return f"resnext{depth}_{groups}x{width}d"
    return f"resnet{depth}" if width == 64 else f"wide_resnet{depth}_{width // 64}"


def _describe_backbone(cfg: CfgNode) -> dict:
    kind = bottom_up_name(cfg.MODEL.BACKBONE.NAME)
    if kind == "contnet":
        node = cfg.MODEL.CONTNET
        options = _contnet_facts(node.VARIANT, cfg) | {
            "num_classes": 0,
            "taps": node.TAPS,
            "output_stride": node.OUTPUT_STRIDE,
            "dilated_patches": node.DILATED_PATCHES,
        }
        return {"network": node.VARIANT, "options": options, "norm": node.NORM}
    if kind == "resnet":
        node = cfg.MODEL.RESNETS
        dilated = cfg.MODEL.BACKBONE.NAME == "build_dilated_resnet_backbone"
        options = {
            "stride_in_1x1": node.STRIDE_IN_1X1,
            "output_stride": node.OUTPUT_STRIDE if dilated else 32,
            "num_groups": node.NUM_GROUPS,
            "width_per_group": node.WIDTH_PER_GROUP,
        }
        name = _resnet_name(node.DEPTH, node.NUM_GROUPS, node.WIDTH_PER_GROUP)
        return {"network": name, "options": options, "norm": node.NORM}
    return {"network": kind}


def describe_model(cfg: CfgNode, classes: Sequence[str] | None) -> Metadata:
    """Returns the metadata of the model that a config builds.

    Args:
        cfg: config of the run.
        classes: names of the data's classes, in order; None if they are unknown.
    """
    classifies = cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"
    return Metadata(
        **(_describe_classifier if classifies else _describe_backbone)(cfg),
        classes=None if classes is None else list(classes),
        pixels={
            "format": cfg.INPUT.FORMAT,
            "mean": list(cfg.MODEL.PIXEL_MEAN),
            "std": list(cfg.MODEL.PIXEL_STD),
        },
        config=cfg.dump(),
        versions=installed_versions(),
    )


# --- comparison ----------------------------------------------------------------------------------


def _check_decisive(ours: Metadata, theirs: Metadata, path: str) -> None:
    """Rejects weights of a network that computes something else."""
    networks = (theirs.network, ours.network)
    for belongs, key in (
        (VARIANTS.__contains__, "MODEL.CONTNET.VARIANT"),
        (_PLAIN_RESNET.fullmatch, "MODEL.RESNETS.DEPTH"),
    ):
        if networks[0] != networks[1] and all(map(belongs, networks)):
            raise UserError(
                f"{path} has weights of {networks[0]}, but the config builds {networks[1]}: set "
                f"{key} (for a classifier MODEL.CLASSIFIER.NAME), or use other weights"
            )
    keys = dict(_DECISIVE)
    # Dilated patches change the function only if convolutions are dilated, too.
    if all(facts.options.get("output_stride", 32) < 32 for facts in (ours, theirs)):
        keys["dilated_patches"] = _DILATED_PATCHES
    for option, key in keys.items():
        pair = [facts.options.get(option) for facts in (theirs, ours)]
        if None not in pair and pair[0] != pair[1]:
            raise UserError(
                f"{path} was trained with {key} {pair[0]}, but the config has {pair[1]}: set {key} "
                f"{pair[0]}, or use other weights"
            )


def _same_norm(ours: str, theirs: str, whole: bool) -> bool:
    # Batch norms of a pretrained backbone may differ, as its statistics are usually frozen.
    return ours == theirs or (not whole and {ours, theirs} <= set(_BATCH_NORMS))


def _same_value(ours: object, theirs: object) -> bool:
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(_same_value, ours, theirs))
    if isinstance(ours, float | int) and isinstance(theirs, float | int):
        return math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=1e-4)
    return ours == theirs


def _differences(ours: Metadata, theirs: Metadata, whole: bool) -> list[str]:
    """Lists settings that differ from those of the training, but do not prevent using weights."""
    pairs = {"network": (theirs.network, ours.network)}
    for name in _ADVISABLE:
        pairs[name] = (theirs.options.get(name), ours.options.get(name))
    for name in ("format", "mean", "std"):
        pairs[f"pixel {name}"] = (theirs.pixels.get(name), ours.pixels.get(name))
    if not _same_norm(ours.norm, theirs.norm, whole):
        pairs["norm"] = (theirs.norm, ours.norm)
    changed = [
        f"{name} {before}, now {now}"
        for name, (before, now) in pairs.items()
        if before not in (None, "") and now not in (None, "") and not _same_value(before, now)
    ]
    # Options of timm's networks, for which a missing option means the default.
    for name in sorted((ours.options.keys() | theirs.options.keys()) - _KINDS.keys()):
        before, now = theirs.options.get(name), ours.options.get(name)
        if not _same_value(before, now):
            changed.append(f"{name} {before}, now {now}")
    return changed


def _unsaid(ours: Metadata, theirs: Metadata, origin: Origin) -> list[str]:
    """Lists settings of a config that the file's metadata, tensors and origin do not show."""
    keys = [
        f"{_DECISIVE[name]} {ours.options[name]}"
        for name in ("pre_norm", "stride_in_1x1")
        if name in ours.options and name not in theirs.options
    ]
    if _STRIDE in ours.options and origin.stride_in_1x1 is not None:
        keys = [key for key in keys if not key.startswith(_DECISIVE[_STRIDE])]
    if ours.pixels and not theirs.pixels and not origin.pixels:
        keys.append(f"{ours.pixels['format']} pixels with MODEL.PIXEL_MEAN and PIXEL_STD")
    return keys


def _keys_of(origin: Origin, ours: Metadata) -> list[str]:
    """Lists the config keys to change, with values, for a file from another library."""
    pairs = {
        key: (origin.pixels.get(name), ours.pixels.get(name)) for name, key in _PIXEL_KEYS.items()
    }
    pairs[_DECISIVE[_STRIDE]] = (origin.stride_in_1x1, ours.options.get(_STRIDE))
    return [
        f'{key} "{value}"' if isinstance(value, list) else f"{key} {value}"
        for key, (value, now) in pairs.items()
        if value is not None and now is not None and not _same_value(value, now)
    ]


def check_network(ours: Metadata, weights: _Weights, whole: bool) -> None:
    """Compares a file's network with the model that will load its weights.

    Logs warnings about unknown and different settings.

    Args:
        ours: metadata of the model.
        weights: :class:`contnet.checkpoint.reading.Weights` of the file.
        whole: whether the file must have the whole model, not only the backbone.

    Raises:
        UserError: for weights of another variant, or an option that changes the function.
    """
    path, origin = weights.path, weights.origin
    theirs = weights.metadata or Metadata(ours.network)
    # ResNets of torchvision and timm never have strides in the 1x1 convolutions.
    if weights.form == "timm" and not origin.stride_in_1x1:
        theirs = replace(theirs, options={_STRIDE: False, **theirs.options})
    _check_decisive(ours, theirs, path)
    if unsaid := _unsaid(ours, theirs, origin):
        weights.warn(
            f"{path} does not contain all settings of its training, so the config's are "
            f"used: {', '.join(unsaid)}"
        )
    if changed := _differences(ours, theirs, whole):
        weights.warn(f"{path} was trained with other settings: {'; '.join(changed)}")
    if weights.metadata is None and (keys := _keys_of(origin, ours)):
        maker = f" ({origin.maker})" if origin.maker else ""
        weights.warn(
            f"{path}{maker} was trained with other pixel values or strides than the config's, "
            f"which gives wrong results: set {' '.join(keys)}, or use other weights"
        )


def check_class_names(
    model: nn.Module,
    ours: Sequence[str] | None,
    theirs: Sequence[str] | None,
    weights: _Weights,
    subset: bool = False,
) -> None:
    """Compares class names, since labels are only numbers.

    Args:
        model: the model that will load the file's head.
        ours: names of the data's classes, in order; None if they are unknown.
        theirs: names of the file's classes, in order; None if they are unknown.
        weights: :class:`contnet.checkpoint.reading.Weights` of the file.
        subset: whether the data may have only some of the file's classes, in any order.

    Raises:
        UserError: if the names differ.
    """
    path = weights.path
    if theirs is None or ours is None:
        who = "the data set does" if theirs else f"{path} does"
        weights.warn(
            f"{who} not name its classes: it is unknown whether the data's labels and the weights' "
            "outputs mean the same classes"
        )
    elif subset and set(ours) <= set(theirs):
        return
    elif differing := describe_difference(ours, theirs):
        advice = "use data with these names in this order, or weights trained on this data"
        if isinstance(model, ImageClassifier):
            advice = (
                "rename its class folders, or for a flat folder write the names in that order to "
                "classes.txt in it"
            )
        raise UserError(
            f"the data's {len(ours)} classes are not the {len(theirs)} that {path} was trained on "
            f"({differing}): {advice}; a new training copies the head's classes by name "
            "(docs/fine_tuning.md)"
        )
