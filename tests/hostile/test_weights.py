"""Tests damaged weights: the tensors that are read are correct, or the file is refused."""

import hashlib
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from damage import damaged, outcome
from hypothesis import given
from hypothesis import strategies as st

from contnet.checkpoint.reading import read_checkpoint, read_weights

FORMS = (".pth", ".safetensors", ".pkl")


def _make(form: str, path: Path) -> dict[str, torch.Tensor]:
    """Writes weights in a format; returns the tensors."""
    generator = torch.Generator().manual_seed(0)
    state = {f"layer{i}.weight": torch.randn(8, 40, generator=generator) for i in range(6)}
    if form == ".pth":
        torch.save({"model": state, "iteration": 3}, path)
    elif form == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        arrays = {name: value.numpy() for name, value in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays}))
    return state


@pytest.mark.parametrize("form", FORMS)
@given(st.data())
def test_damaged_weights_are_refused_or_equal(tmp_path_factory, form, data):
    """Formats without a checksum have one in the file name, as PyTorch's files do."""
    folder = tmp_path_factory.getbasetemp()
    state = _make(form, folder / f"whole{form}")
    whole = (folder / f"whole{form}").read_bytes()
    digest = hashlib.sha256(whole).hexdigest()[:16]
    path = folder / (f"weights{form}" if form == ".pth" else f"weights-{digest}{form}")
    path.write_bytes(data.draw(damaged(whole)))
    weights, refused = outcome(lambda: read_weights(str(path)))
    if not refused:
        assert weights.tensors.keys() == state.keys()
        assert all(torch.equal(weights.tensors[name], state[name]) for name in state)
    outcome(lambda: read_checkpoint(str(path)))


@pytest.mark.parametrize("form", FORMS)
@given(st.data())
def test_damaged_weights_without_a_check_sum(tmp_path_factory, form, data):
    """Changed values cannot be detected, but the result is only tensors or a one-line error."""
    path = tmp_path_factory.getbasetemp() / f"plain{form}"
    _make(form, path)
    path.write_bytes(data.draw(st.one_of(damaged(path.read_bytes()), st.binary(max_size=200))))
    weights, refused = outcome(lambda: read_weights(str(path)))
    assert refused or all(isinstance(each, torch.Tensor) for each in weights.tensors.values())
