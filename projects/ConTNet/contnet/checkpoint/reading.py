"""Reads weight files, and finds the known facts about them.

A file in any format (ours, the authors', torchvision's, timm's, Detectron2's) is opened once and
becomes :class:`Weights`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from contnet.checkpoint.content import read_content
from contnet.checkpoint.fetching import fetch_weights
from contnet.checkpoint.key_mapping import locate_networks
from contnet.checkpoint.metadata import METADATA, Metadata
from contnet.checkpoint.origins import Origin, find_origin
from contnet.checkpoint.verification import verify_file
from contnet.utils.errors import UserError
from contnet.utils.files import open_regular
from contnet.utils.text import printable

__all__ = [
    "EMA_KEYS",
    "NUM_AVERAGED",
    "Weights",
    "conversion_advice",
    "read_checkpoint",
    "read_class_names",
    "read_weights",
]

logger = logging.getLogger(__name__)

# Keys of EMA weights in files of our trainer, torchvision's scripts and timm.
EMA_KEYS = ("ema", "model_ema", "state_dict_ema")
# Keys of the last step's weights; the last two are those of pycls and Caffe2.
_MODEL_KEYS = ("model", "state_dict", "model_state", "blobs")
# Name of the counter that PyTorch's AveragedModel stores among its weights.
NUM_AVERAGED = "n_averaged"
# Prefixes that DistributedDataParallel and torch.compile add to names.
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
# Largest size, in bytes, of a tensor that repeats a smaller storage.
_EXPANDED = 2**26


@contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """Opens the file once, so that the file that is verified is also the one that is loaded."""
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def read_checkpoint(path: str) -> dict:
    """Reads a checkpoint from the disk; its tensors are read only when they are used.

    Only the parts of the file without tensors are verified.

    Args:
        path: path of the file.

    Raises:
        UserError: as in :func:`contnet.checkpoint.content.read_content`.
    """
    with _open(path) as file:
        verify_file(file, path, tensors=False)
        return read_content(file, path, mmap=True)


# --- weights -------------------------------------------------------------------------------------


@dataclass
class Weights:
    """The tensors of a file, and the known facts about them.

    Attributes:
        path: path of the file, for messages.
        tensors: tensors by the names in the file, without the prefixes of wrappers.
        origins: full names in the file by these names.
        odd: names in the file of entries among the tensors that are not tensors.
        key: the file's key of the tensors; "" if the file contains nothing else.
        is_ema: whether the tensors are an exponential moving average.
        rest: the other entries of the file.
        metadata: metadata in the file; None if it has none about its network.
        classes: names of the classes in training, in order; None if they are unknown.
        origin: facts about the file from its origin.
        form: naming scheme of the single network in it, a key of ``MARKS``; "" if it is unknown.
        prefix: prefix of this network's names in ``tensors``.
        matching: "" if names are exact; "detectron2" or "caffe2" if Detectron2 matches tensors by
            similar names.
        sha256: SHA-256 of the file, if requested.
        warnings: warnings about the file that concern results, a line each.
    """

    path: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)
    key: str = ""
    is_ema: bool = False
    rest: dict = field(default_factory=dict)
    metadata: Metadata | None = None
    classes: list[str] | None = None
    origin: Origin = field(default_factory=Origin)
    form: str = ""
    prefix: str = ""
    matching: str = ""
    sha256: str = ""
    warnings: list[str] = field(default_factory=list)

    def warn(self, line: str) -> None:
        """Logs a warning that concerns results, and adds it to ``warnings``."""
        logger.warning(line)
        self.warnings.append(line)

    def network_tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of the single known network, by the names of its naming scheme."""
        return {
            name.removeprefix(self.prefix): value
            for name, value in self.tensors.items()
            if name.startswith(self.prefix)
        }


def conversion_advice(path: str) -> str:
    """Returns advice for a file that does not fit."""
    return (
        f"python tools/convert_weights.py {path} NEW.pth shows what it contains, and converts the "
        "weights of a ConTNet or ResNet in it"
    )


def _pick(content: Mapping, prefer_ema: bool) -> tuple[Mapping, str]:
    """Returns the state dict in a checkpoint and its key, or the checkpoint itself and ""."""
    keys = (*EMA_KEYS, *_MODEL_KEYS) if prefer_ema else (*_MODEL_KEYS, *EMA_KEYS)
    for key in keys:
        if isinstance(content.get(key), Mapping) and content[key]:
            return content[key], key
    return content, ""


def _matching(content: Mapping, state: Mapping) -> str:
    """Returns how names are matched; pycls, Detectron2 and Caffe2 need Detectron2's heuristics."""
    if "model_state" in content or content.get("matching_heuristics") is True:
        return "detectron2"
    arrays = any(isinstance(value, np.ndarray) for value in state.values())
    exact = "__author__" in content or locate_networks(map(str, state))
    return "caffe2" if arrays and not exact else ""


def _as_tensor(value: object) -> Tensor | None:
    """Returns a plain tensor with its own values; None for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.array(value))
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return None
    # The tensor claims many more values than its storage has.
    if value.nbytes > max(_EXPANDED, value.untyped_storage().nbytes()):
        return None
    return Tensor.detach(value)


def _fill(weights: Weights, state: Mapping) -> None:
    """Sorts the entries of a state dict, and finds the network in it."""
    tensors = {name: _as_tensor(value) for name, value in state.items()}
    # Without a wrapper, the model itself may have a part that is called "module".
    wrapped = all(
        _WRAPPERS.match(str(name))
        for name, tensor in tensors.items()
        if tensor is not None and name != NUM_AVERAGED
    )
    for name, tensor in tensors.items():
        short = _WRAPPERS.sub("", str(name)) if wrapped else str(name)
        if tensor is None or not isinstance(name, str):
            weights.odd.append(str(name))
        elif short in weights.tensors:
            raise UserError(
                f"{weights.path} contains {printable(short, 200)} twice, in two wrappers"
            )
        else:
            weights.tensors[short], weights.origins[short] = tensor, name
    networks = locate_networks(weights.tensors)
    if len(networks) == 1:
        weights.form, weights.prefix = networks[0]


def _class_names(rest: Mapping, metadata: Metadata | None) -> list[str] | None:
    if metadata is not None:
        return metadata.classes
    # Checkpoints of the first version have the names in the trainer's state.
    trainer = rest.get("trainer")
    names = trainer.get("classes") if isinstance(trainer, Mapping) else None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def read_weights(source: str, *, prefer_ema: bool = False, digest: bool = False) -> Weights:
    """Reads a file of weights.

    Args:
        source: a file, or an address for :func:`contnet.checkpoint.fetching.fetch_weights`.
        prefer_ema: whether to use the EMA of the weights, if there is one, instead of the last
            weights.
        digest: whether to compute the file's SHA-256.

    Raises:
        UserError: if the file does not exist, is damaged, has no tensors, or would run code.
    """
    fetched = fetch_weights(source)
    path = fetched.path
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file (looked for in {Path.cwd()})")
    weights = Weights(source)
    with _open(path) as file:
        weights.sha256 = verify_file(file, path, digest=fetched.digest)
        if digest and not weights.sha256:
            weights.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
        content = read_content(file, path)
    state, weights.key = _pick(content, prefer_ema)
    weights.matching = _matching(content, state)
    if weights.matching == "caffe2":
        state = {k: v for k, v in state.items() if not str(k).endswith("_momentum")}
    if weights.key:
        weights.rest = {name: value for name, value in content.items() if name != weights.key}
    weights.is_ema = weights.key in EMA_KEYS
    weights.metadata = Metadata.read(weights.rest.get(METADATA), source)
    weights.classes = _class_names(weights.rest, weights.metadata)
    _fill(weights, state)
    origin = find_origin(content, weights.tensors, weights.rest, weights.matching, source)
    if fetched.pixels:
        origin = replace(origin, maker=fetched.maker, pixels=fetched.pixels)
    if fetched.classes:
        origin = replace(origin, classes=fetched.classes)
    weights.origin = origin
    if weights.classes is None and weights.metadata is None:
        weights.classes = origin.classes
    if not weights.tensors:
        raise UserError(
            f"{source} contains no weights: it must be only tensors by name, or have them as "
            f"{' or '.join(map(repr, _MODEL_KEYS[:2]))}; {conversion_advice(source)}"
        )
    return weights


@lru_cache(maxsize=1)
def _class_names_of(source: str, changed: int) -> list[str] | None:
    return read_weights(source).classes


def read_class_names(source: str) -> list[str] | None:
    """Reads the names of the classes that weights were trained on, in order; None if unknown.

    The arguments and errors are those of :func:`read_weights`.
    """
    path = fetch_weights(source).path
    changed = os.stat(path).st_mtime_ns if os.path.isfile(path) else 0
    return _class_names_of(source, changed)
