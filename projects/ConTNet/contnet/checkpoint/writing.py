"""Writes weight files for publication: plain tensors with metadata, named by their hash."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from contnet.checkpoint.metadata import METADATA
from contnet.utils.files import atomic_write, writing

__all__ = ["encode_weights", "write_weights"]


def encode_weights(tensors: Mapping[str, Tensor], metadata: Mapping, suffix: str) -> bytes:
    """Returns the bytes of a weight file; the same input gives the same bytes.

    Args:
        tensors: tensors by name.
        metadata: from :meth:`contnet.checkpoint.metadata.Metadata.state`.
        suffix: ``.safetensors`` or ``.pth``.
    """
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    if suffix == ".safetensors":
        # A single entry, because several may be written in any order, which changes the hash.
        return safetensors.torch.save(tensors, {METADATA: json.dumps(metadata)})
    buffer = io.BytesIO()
    torch.save({"model": tensors, METADATA: metadata}, buffer)
    return buffer.getvalue()


def write_weights(path: Path, data: bytes) -> Path:
    """Writes a file with the start of its hash in its name, as in torch.hub; returns its path.

    Raises:
        UserError: if the file cannot be written.
    """
    digest = hashlib.sha256(data).hexdigest()
    path = path.with_name(f"{path.stem}-{digest[:8]}{path.suffix}")
    with writing(path), atomic_write(path) as file:
        file.write(data)
    return path
