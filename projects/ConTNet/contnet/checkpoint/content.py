"""Reads the contents of weight files from any source, and never runs code from them.

Only this module recognises file formats: PyTorch's, .safetensors and .pkl. It gets an open file, so
the file that is checked is the file that is loaded.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from contnet.checkpoint.metadata import METADATA
from contnet.checkpoint.pickles import (
    NUMPY,
    RunsCode,
    find_kinds,
    load_pickle,
    make_stand_in,
    without_attributes,
)
from contnet.utils.errors import UserError
from contnet.utils.text import first_names, printable

__all__ = ["read_content"]

# First bytes of torch.save files from before PyTorch 1.6: a pickled number. Two more pickles come
# before that of the content.
_TORCH_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 4
_STATE_DICT = "where the file was made, save model.state_dict() with torch.save, and use that file"


def _first_line(error: Exception) -> str:
    """Returns the first line of a library's error, without PyTorch's advice of unsafe loading."""
    lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    line = printable(lines[0], 300) if lines else type(error).__name__
    return "it cannot be unpickled" if "weights_only" in line or "safe_globals" in line else line


def _refusal(path: str, error: Exception, left_out: Collection[str]) -> UserError:
    """Returns the error for a file that cannot be read.

    Args:
        path: path of the file.
        error: the error that was raised while reading it.
        left_out: names of the classes in the file whose objects are not plain values.
    """
    what = f"{path} is not a checkpoint of tensors and plain values"
    if isinstance(error, RunsCode):
        name = printable(str(error), 100)
        return UserError(f"{what}: it would run code ({name}), do not use this file")
    reason = _first_line(error)
    if names := sorted(left_out):
        return UserError(
            f"{what}: it contains Python objects ({first_names(names)}), which are not loaded, "
            f"since that could run code, and cannot be read without them ({reason}): {_STATE_DICT}"
        )
    if isinstance(error, pickle.UnpicklingError):
        return UserError(f"{what}: {reason}")
    return UserError(f"{path} cannot be read, it may be truncated: {reason}")


# --- formats -------------------------------------------------------------------------------------


def _check_archive(archive: zipfile.ZipFile, size: int, path: str) -> None:
    """Rejects TorchScript archives, and archives that unpack to more bytes than the file has."""
    entries = archive.infolist()
    if any(Path(entry.filename).name == "constants.pkl" for entry in entries):
        raise UserError(f"{path} is a TorchScript archive, which contains code: {_STATE_DICT}")
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > size:
        raise UserError(
            f"{path} unpacks to more than its {size} bytes, which no file of torch.save does: "
            "download it again, or from another source"
        )


def _kinds_in(file: BinaryIO, path: str) -> dict[str, type | None]:
    """Returns the kinds of objects in a torch.save file, by the name of class or function."""
    if file.read(2) != b"PK":
        file.seek(0)
        return find_kinds(file, _LEGACY_PICKLES)
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        _check_archive(archive, size, path)
        pickles = [each for each in archive.infolist() if Path(each.filename).name == "data.pkl"]
        for each in pickles:
            if not each.CRC:  # saved with set_crc32_options(False)
                del each.CRC  # otherwise, zipfile would compare it
        found = [find_kinds(io.BytesIO(archive.read(each))) for each in pickles]
    return {name: kind for each in found for name, kind in each.items()}


def _read_torch(file: BinaryIO, path: str, mmap: bool, left_out: set[str]) -> object:
    kinds = _kinds_in(file, path)
    if "builtins.bytearray" in kinds:  # PyTorch allocates whatever size the file gives
        raise pickle.UnpicklingError("it contains a bytearray")
    file.seek(0)
    # PyTorch uses these only for names that it does not support itself.
    allowed = [
        (NUMPY.get(name) or make_stand_in(name, kind, left_out), name)
        for name, kind in kinds.items()
    ]
    source = f"/dev/fd/{file.fileno()}" if mmap else file  # its name may be another file now
    with torch.serialization.safe_globals(allowed):
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)


def _read_safetensors(file: BinaryIO, path: str) -> dict:
    """Returns tensors under "model", and the file's metadata under ``METADATA``."""
    data = file.read()
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError) as error:
        reason = printable(" ".join(str(error).split()), 300)
        raise UserError(
            f"{path} cannot be read, it may be truncated or not a .safetensors file: {reason}"
        ) from error
    # The file begins with the length of its header, which is JSON.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        said = json.loads(header.get("__metadata__", {}).get(METADATA, "{}"))
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} has metadata that are not JSON: {error}") from error
    return {"model": tensors, METADATA: said}


def _format(start: bytes, suffix: str) -> str:
    """Recognises a file's format by its first bytes, otherwise by its suffix."""
    if start.startswith((b"PK", _TORCH_MAGIC)):
        return "torch"
    if start[4:9] == b"\0\0\0\0{" or suffix == ".safetensors":
        return "safetensors"
    return "pickle" if start.startswith(b"\x80") or suffix == ".pkl" else ""


# --- reading -------------------------------------------------------------------------------------


def _holds_tensors(content: Mapping) -> bool:
    """Whether the content, or a dict in it, contains tensors."""
    values = [*content.values()]
    values += [value for part in values if isinstance(part, Mapping) for value in part.values()]
    return any(isinstance(value, Tensor | np.ndarray) for value in values)


def _read_pickled(file: BinaryIO, path: str, form: str, mmap: bool) -> object:
    left_out: set[str] = set()
    try:
        if form == "torch":
            content = _read_torch(file, path, mmap, left_out)
        else:
            content = load_pickle(file, left_out)
        content = without_attributes(content)
    except UserError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise _refusal(path, error, left_out) from error
    if left_out and isinstance(content, Mapping) and not _holds_tensors(content):
        raise _refusal(path, pickle.UnpicklingError("it has no tensors besides them"), left_out)
    return content


def read_content(file: BinaryIO, path: str, mmap: bool = False) -> dict:
    """Reads a dict of tensors and plain values; the format is detected from the content.

    Objects of other classes become empty dicts.

    Args:
        file: open file, at its beginning; for ``mmap`` it must be on the disk.
        path: path of the file, for messages.
        mmap: read tensors only when they are used, if the format allows it.

    Raises:
        UserError: if the file is incomplete, would run code, contains only objects of other
            classes, or is not a dict.
    """
    start = file.read(len(_TORCH_MAGIC))
    file.seek(0)
    form = _format(start, Path(path).suffix)
    if form == "safetensors":
        return _read_safetensors(file, path)
    if not form:
        raise UserError(
            f"{path} cannot be read, it may be truncated: it is not a torch.save file (since "
            "PyTorch 0.2), a .safetensors or a .pkl file"
        )
    content = _read_pickled(file, path, form, mmap and start.startswith(b"PK"))
    if not isinstance(content, Mapping):
        raise UserError(f"{path} contains a {type(content).__name__}, not a checkpoint")
    return dict(content)
