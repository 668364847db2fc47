"""Reads files of weights without ever running code from them: .safetensors, PyTorch's and .pkl."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from contnet.utils.errors import UserError

__all__ = [
    "EMA_KEYS",
    "METADATA",
    "MODEL_KEYS",
    "pick_weights",
    "read_checkpoint",
    "read_plain_pickle",
    "read_safetensors",
    "read_torch",
    "strip_wrapper_prefix",
    "trained_class_names",
]

# Under this name a file of tools/convert_weights.py says what it holds.
METADATA = "contnet"
# EMA weights by the names of our trainer, torchvision's scripts and timm's.
EMA_KEYS = ("ema", "model_ema", "state_dict_ema")
# Weights of the last step.
MODEL_KEYS = ("model", "state_dict")
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
_ASKED_FOR = re.compile(r"GLOBAL (\S+) was not an allowed global|but got <class '([^']+)'>")
_BLOCKED = re.compile(r"GLOBAL (\S+) whose module \S+ is blocked")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_plain_pickle(path: str) -> Mapping:
    """Reads a .pkl file, which Detectron2 loads without any check, as arrays and plain values.

    Raises:
        UserError: if it is anything else.
    """
    try:
        with open(path, "rb") as file:
            content = _PlainUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a file that is no pickle may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a pickle of plain arrays: {reason}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


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


def read_torch(path: str) -> dict:
    """Reads what ``torch.save`` wrote: tensors, plain values and numpy's numbers.

    Raises:
        UserError: if it holds anything else, is cut short, or is no dict.
    """
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, error) from error
    except Exception as error:  # a damaged file may raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it is empty"
        raise UserError(f"{path} cannot be read, it may be cut short: {reason}") from error
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a checkpoint")
    return dict(loaded)


def read_safetensors(path: str) -> dict:
    """Reads tensors under "model", and under ``METADATA`` what the file says of itself.

    Raises:
        UserError: if it is no whole .safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = (file.metadata() or {}).get(METADATA, "{}")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be read, it may be cut short or no .safetensors file: {reason}"
        ) from error
    try:
        metadata = json.loads(said)
    except ValueError as error:
        raise UserError(f"{path} has metadata that are no JSON: {error}") from error
    return {"model": tensors, METADATA: metadata}


def pick_weights(content: Mapping, keys: Sequence[str]) -> tuple[Mapping, str, list[str]]:
    """Finds the state dict of a checkpoint.

    Args:
        content: of the file.
        keys: where it may be, the first choice first.

    Returns:
        The state dict, its key in the checkpoint ("" where it is the checkpoint itself), and the
        other keys.
    """
    for key in keys:
        if isinstance(content.get(key), Mapping) and content[key]:
            return content[key], key, [str(other) for other in content if other != key]
    return content, "", []


def strip_wrapper_prefix(name: str) -> str:
    """A tensor's name without what DistributedDataParallel and torch.compile put before it."""
    return _WRAPPERS.sub("", name)


def trained_class_names(content: Mapping) -> list[str] | None:
    """The classes that a checkpoint was trained on, in order, where it says so."""
    for key in ("trainer", METADATA):
        said = content.get(key)
        names = said.get("classes") if isinstance(said, Mapping) else None
        if isinstance(names, list) and names:
            return [str(name) for name in names]
    return None


def read_checkpoint(path: str) -> dict:
    """Reads a file of weights by its suffix; any but .safetensors and .pkl is PyTorch's.

    Raises:
        UserError: if it is not there, not whole, or holds more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file (looked for in {Path.cwd()})")
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    if path.endswith(".pkl"):
        content = dict(read_plain_pickle(path))
        state = content.get("model", content)
        if not isinstance(state, Mapping):
            return content
        tensors = {
            name: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
            for name, value in state.items()
        }
        return {**content, "model": tensors} if "model" in content else tensors
    return read_torch(path)
