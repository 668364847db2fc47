"""Reads files of weights: what they hold, never running code from them, and what is known of it.

A file of whatever form (ours, the authors', torchvision's, timm's, Detectron2's; PyTorch's,
.safetensors, .pkl) is opened once and becomes :class:`Weights`. Forms are recognised here and
nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from contnet.checkpoint.fetching import fetch_weights
from contnet.checkpoint.key_mapping import locate_networks
from contnet.checkpoint.metadata import METADATA, Metadata
from contnet.checkpoint.origins import Origin, find_origin
from contnet.utils.errors import UserError

__all__ = [
    "EMA_KEYS",
    "NUM_AVERAGED",
    "Weights",
    "conversion_advice",
    "read_checkpoint",
    "read_class_names",
    "read_content",
    "read_weights",
]

logger = logging.getLogger(__name__)

# EMA weights by the names of our trainer, torchvision's scripts and timm's.
EMA_KEYS = ("ema", "model_ema", "state_dict_ema")
# Weights of the last step; the last two names are pycls's and Caffe2's.
_MODEL_KEYS = ("model", "state_dict", "model_state", "blobs")
# How many weights PyTorch's AveragedModel has averaged, beside them.
NUM_AVERAGED = "n_averaged"
# What DistributedDataParallel and torch.compile put before names.
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")

# All that arrays and plain values are made of in a pickle.
_PLAIN = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
}
# A training script's accuracy is often numpy's: numbers, by the names of numpy 1 and 2.
_scalar = np.float64(0).__reduce__()[0]
_NUMBERS = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *dict.fromkeys(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
]
# An array's parts, by the names of numpy 1 and 2.
_reconstruct = np.zeros(1).__reduce__()[0]
_ARRAYS = [
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
]
# Objects that training scripts save beside their weights, and that are no matter of weights.
_LEFT_OUT = (
    "argparse.Namespace",
    "detectron2.config.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "omegaconf.dictconfig.DictConfig",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "yacs.config.CfgNode",
)
# What torch.save wrote before PyTorch 1.6 begins with: a pickle of a number.
_TORCH_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_ASKED_FOR = re.compile(r"GLOBAL (\S+) was not an allowed global|but got <class '([^']+)'>")
_BLOCKED = re.compile(r"GLOBAL (\S+) whose module \S+ is blocked")


# --- the content of a file -----------------------------------------------------------------------


class _LeftOut(dict):
    """Stands for an object of another package, which is neither imported nor built."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _read_pickle(file: BinaryIO, path: str) -> object:
    try:
        return _PlainUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a file that is no pickle may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a pickle of plain arrays: {reason}") from error


def _refusal(path: str, error: pickle.UnpicklingError) -> UserError:
    what = f"{path} is not a checkpoint of tensors and plain numbers"
    if blocked := _BLOCKED.search(str(error)):
        return UserError(f"{what}: it wants to run code ({blocked[1]}), do not use this file")
    if not (asked := _ASKED_FOR.search(str(error))):
        # PyTorch's advice before that, or without it, is to load it unsafely.
        _, found, reason = str(error).rpartition("WeightsUnpickler error:")
        lines = reason.strip().splitlines() if found else []
        return UserError(f"{what}: {lines[0] if lines else 'it cannot be unpickled'}")
    return UserError(
        f"{what}: it holds a Python object ({asked[1] or asked[2]}), which is not loaded, since "
        "that could run code; get a file of the weights alone, or make one where you trust the "
        "file: python -c 'import torch; "
        'torch.save(torch.load("FILE", "cpu", weights_only=False)["model"], "WEIGHTS.pth")\' '
        '(or .state_dict() in the place of ["model"])'
    )


def _read_torch(file: BinaryIO | str, path: str, mmap: bool = False) -> object:
    try:
        allowed = [*_NUMBERS, *_ARRAYS, *((_LeftOut, name) for name in _LEFT_OUT)]
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise _refusal(path, error) from error
    except Exception as error:  # a damaged file may raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it is empty"
        raise UserError(f"{path} cannot be read, it may be cut short: {reason}") from error


def _read_safetensors(file: BinaryIO, path: str) -> dict:
    """Tensors under "model", and under ``METADATA`` what the file says of itself."""
    data = file.read()
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be read, it may be cut short or no .safetensors file: {reason}"
        ) from error
    # The file begins with the length of its header, which is JSON.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        said = json.loads(header.get("__metadata__", {}).get(METADATA, "{}"))
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} has metadata that are no JSON: {error}") from error
    return {"model": tensors, METADATA: said}


def _format(start: bytes, suffix: str) -> str:
    """Recognises a file by its first bytes; what cannot be told from them, by its suffix."""
    if start.startswith((b"PK", _TORCH_MAGIC)):
        return "torch"
    if start[4:9] == b"\0\0\0\0{" or suffix == ".safetensors":
        return "safetensors"
    return "pickle" if start.startswith(b"\x80") or suffix == ".pkl" else "torch"


_READERS = {"torch": _read_torch, "safetensors": _read_safetensors, "pickle": _read_pickle}


def read_content(file: BinaryIO, path: str) -> dict:
    """Reads a dict of tensors and plain values; the file's form goes by its content.

    Args:
        file: open, at its beginning.
        path: its name.

    Raises:
        UserError: if it is not whole, holds anything else, or is no dict.
    """
    start = file.read(len(_TORCH_MAGIC))
    file.seek(0)
    content = _READERS[_format(start, Path(path).suffix)](file, path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return dict(content)


def read_checkpoint(path: str) -> dict:
    """Reads a checkpoint that is on the disk, its tensors only when they are looked at.

    Args:
        path: of the file.

    Raises:
        UserError: as :func:`read_content`.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(2)
            file.seek(0)
            content = _read_torch(path, path, mmap=True) if start == b"PK" else None
            return read_content(file, path) if not isinstance(content, Mapping) else dict(content)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


# --- what it is ----------------------------------------------------------------------------------


@dataclass
class Weights:
    """The tensors of a file, and what is known about them.

    Attributes:
        path: of the file, for messages.
        tensors: by the names in the file, without the prefixes of wrappers.
        origins: the names in the file of these names.
        odd: names in the file of entries among the tensors that are none.
        key: where in the file they were; "" where the file holds nothing else.
        is_ema: whether they are an exponential moving average.
        rest: what else the file holds.
        metadata: what the file says of itself; None where it says nothing of its network.
        classes: names of the classes that it was trained on, in order; None where nothing tells.
        origin: what is known of the file by who made it.
        form: whose names the one network in it has, a key of ``MARKS``; "" for an unknown network.
        prefix: of this network's names in ``tensors``.
        matching: "" where names are exact; "detectron2" or "caffe2" where Detectron2 finds out by
            similarity which tensor is which.
        sha256: of the file, if it was asked for.
        warnings: what was said of it that changes results, a line each.
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
        """Says what changes results, in the log and in ``warnings``."""
        logger.warning(line)
        self.warnings.append(line)

    def network_tensors(self) -> dict[str, Tensor]:
        """Tensors of the one network of a known form, by the names of that form."""
        return {
            name.removeprefix(self.prefix): value
            for name, value in self.tensors.items()
            if name.startswith(self.prefix)
        }


def conversion_advice(path: str) -> str:
    """What may help with a file that does not fit."""
    return (
        f"python tools/convert_weights.py {path} NEW.pth says what it holds, and makes weights of "
        "a ConTNet or ResNet in it fit"
    )


def _pick(content: Mapping, prefer_ema: bool) -> tuple[Mapping, str]:
    """The state dict of a checkpoint, and its key; the checkpoint itself, and ""."""
    keys = (*EMA_KEYS, *_MODEL_KEYS) if prefer_ema else (*_MODEL_KEYS, *EMA_KEYS)
    for key in keys:
        if isinstance(content.get(key), Mapping) and content[key]:
            return content[key], key
    return content, ""


def _matching(content: Mapping, state: Mapping) -> str:
    """How names are matched; the model zoos of pycls, Detectron2 and Caffe2 leave that open."""
    if "model_state" in content or content.get("matching_heuristics") is True:
        return "detectron2"
    arrays = any(isinstance(value, np.ndarray) for value in state.values())
    exact = "__author__" in content or locate_networks(map(str, state))
    return "caffe2" if arrays and not exact else ""


def _as_tensor(value: object) -> Tensor | None:
    """A tensor with values of its own; None for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.array(value))
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    return value if dense else None


def _fill(weights: Weights, state: Mapping) -> None:
    """Sorts the entries of a state dict, and finds the network in it."""
    tensors = {name: _as_tensor(value) for name, value in state.items()}
    # A model of its own may have a part that is called "module".
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
            raise UserError(f"{weights.path} holds {short!r} twice, in two wrappers")
        else:
            weights.tensors[short], weights.origins[short] = tensor, name
    networks = locate_networks(weights.tensors)
    if len(networks) == 1:
        weights.form, weights.prefix = networks[0]


def _class_names(rest: Mapping, metadata: Metadata | None) -> list[str] | None:
    if metadata is not None:
        return metadata.classes
    # Checkpoints of the first version.
    trainer = rest.get("trainer")
    names = trainer.get("classes") if isinstance(trainer, Mapping) else None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def read_weights(source: str, *, prefer_ema: bool = False, digest: bool = False) -> Weights:
    """Reads a file of weights, once.

    Args:
        source: a file, or an address of :func:`contnet.checkpoint.fetching.fetch_weights`.
        prefer_ema: take the EMA of weights, where there is one, and not the last weights.
        digest: compute the file's SHA-256.

    Raises:
        UserError: if it is not there, not whole, or holds no tensors or more than tensors and
            plain values.
    """
    fetched = fetch_weights(source)
    path = fetched.path
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file (looked for in {Path.cwd()})")
    weights = Weights(source)
    try:
        with open(path, "rb") as file:
            if digest:
                weights.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
            content = read_content(file, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
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
            f"{source} holds no weights: it must be tensors by name alone, or have them as "
            f"{' or '.join(map(repr, _MODEL_KEYS[:2]))}; {conversion_advice(source)}"
        )
    return weights


@lru_cache(maxsize=1)
def _class_names_of(source: str, changed: int) -> list[str] | None:
    return read_weights(source).classes


def read_class_names(source: str) -> list[str] | None:
    """Names of the classes that weights were trained on, in order; None where nothing tells them.

    The arguments and errors are those of :func:`read_weights`.
    """
    path = fetch_weights(source).path
    changed = os.stat(path).st_mtime_ns if os.path.isfile(path) else 0
    return _class_names_of(source, changed)
