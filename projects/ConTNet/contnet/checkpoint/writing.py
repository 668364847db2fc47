"""Files of weights for others: plain tensors with their facts, named by their hash."""

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
    """The bytes of a file of weights; the same input gives the same bytes.

    Args:
        tensors: by name.
        metadata: of :meth:`contnet.checkpoint.metadata.Metadata.state`.
        suffix: ``.safetensors`` or ``.pth``.
    """
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    if suffix == ".safetensors":
        # A single entry: several would be written in any order, and change the hash.
        return safetensors.torch.save(tensors, {METADATA: json.dumps(metadata)})
    buffer = io.BytesIO()
    torch.save({"model": tensors, METADATA: metadata}, buffer)
    return buffer.getvalue()


def write_weights(path: Path, data: bytes) -> Path:
    """Writes a file whose name has the start of its hash, as torch.hub checks it; its path.

    Raises:
        UserError: if it cannot be written.
    """
    digest = hashlib.sha256(data).hexdigest()
    path = path.with_name(f"{path.stem}-{digest[:8]}{path.suffix}")
    with writing(path), atomic_write(path) as file:
        file.write(data)
    return path
