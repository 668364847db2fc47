"""Tests that damaged files are refused before anything is loaded."""

import hashlib
import random

import pytest
import safetensors.torch
import torch

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.reading import read_checkpoint, read_weights
from contnet.utils.errors import UserError


@pytest.fixture
def checkpoint(tmp_path):
    """Saves a file with a large tensor, small tensors, and a trainer state."""
    tensors = {f"layer{i}.weight": torch.randn(64, 64) for i in range(8)}
    tensors["large.weight"] = torch.randn(192, 192)
    path = tmp_path / "model_0000001.pth"
    torch.save({"model": tensors, "trainer": {"iteration": 1}}, path)
    return path


def refused(path) -> bool:
    """Returns whether the file cannot be read; checks that the error is one line."""
    try:
        read_weights(str(path))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return True
    return False


def same(a, b) -> bool:
    tensors = a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(value, b.tensors[name]) for name, value in a.tensors.items()
    )
    return tensors and a.rest == b.rest


def test_a_flipped_bit_is_refused_or_changes_nothing(checkpoint):
    """It changes nothing only in fields that no reader uses, such as dates."""
    whole, expected = checkpoint.read_bytes(), read_weights(str(checkpoint))
    dice, accepted = random.Random(0), 0
    # Most bytes belong to tensors; both ends have the pickle and the zip file's directory.
    places = [dice.randrange(len(whole)) for _ in range(64)]
    places += [dice.randrange(1024) for _ in range(32)]
    places += [dice.randrange(len(whole) - 2048, len(whole)) for _ in range(96)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << dice.randrange(8)
        checkpoint.write_bytes(damaged)
        if not refused(checkpoint):
            accepted += 1
            assert same(read_weights(str(checkpoint)), expected), place
    assert accepted < len(places) / 3


def test_a_hole_of_zeros_is_refused(checkpoint):
    whole = checkpoint.read_bytes()
    tensor = whole.index(read_weights(str(checkpoint)).tensors["large.weight"].numpy().tobytes())
    for start in (tensor + 4096, 0, len(whole) // 2, len(whole) - 2**16):
        checkpoint.write_bytes(whole[:start] + bytes(2**16) + whole[start + 2**16 :])
        assert refused(checkpoint), start


def test_a_cut_file_is_refused(checkpoint):
    whole = checkpoint.read_bytes()
    dice = random.Random(0)
    for length in (
        0,
        1,
        2,
        4,
        22,
        len(whole) - 1,
        *(dice.randrange(len(whole)) for _ in range(16)),
    ):
        checkpoint.write_bytes(whole[:length])
        assert refused(checkpoint), length


def test_settings_are_verified_without_the_tensors(checkpoint):
    whole = checkpoint.read_bytes()
    place = whole.index(b"iteration")
    checkpoint.write_bytes(whole[:place] + b"iteratiom" + whole[place + 9 :])
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(str(checkpoint))


def test_files_without_crc_are_read(tmp_path):
    """PyTorch writes such files if it is configured to."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(3)}, tmp_path / "fast.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_weights(str(tmp_path / "fast.pth")).tensors["weight"], torch.ones(3))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_hash_in_the_name(tmp_path, suffix):
    file = tmp_path / "net"
    if suffix == "pth":
        # Without a CRC.
        torch.save({"weight": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    else:
        safetensors.torch.save_file({"weight": torch.ones(3)}, file)
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:32]
    for name in (f"net-{digest}", "net-20261129", "net-final", "deadbeef"):
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(content)
        assert not refused(path)
    place = content.index(torch.ones(3).numpy().tobytes())
    damaged = tmp_path / f"net-{digest}.{suffix}"
    damaged.write_bytes(content[:place] + b"\1" + content[place + 1 :])
    assert refused(damaged)


@pytest.mark.parametrize("background", [False, True])
def test_what_was_written_is_read_back(tmp_path, monkeypatch, background):
    """If a write fails unnoticed, the previous checkpoint stays."""
    checkpointer = Checkpointer(torch.nn.Linear(8, 8), str(tmp_path), background=background)
    checkpointer.save("model_0000001")
    checkpointer.wait()
    before = (tmp_path / "model_0000001.pth").read_bytes()

    def save_badly(data, file):
        save(data, file)
        file.seek(-1000, 2)
        file.write(b"\xff" * 8)

    save = torch.save
    monkeypatch.setattr("torch.save", save_badly)
    for name in ("model_0000002", "model_0000001"):
        with pytest.raises(UserError, match=rf"{name}\.pth cannot be written"):
            checkpointer.save(name)
            checkpointer.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"model_0000001.pth", "last_checkpoint"}
    assert (tmp_path / "model_0000001.pth").read_bytes() == before
