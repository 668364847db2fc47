"""Tests foreign files and networks, which are refused in one line and never executed."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from conversions import assert_same, load, ours
from oracle import make_oracle

import contnet
from contnet.checkpoint.reading import read_weights

pytest_plugins = ["conversions"]

WRAPPINGS = {
    "bare": lambda state: state,
    "bare module": lambda state: {f"module.{k}": v for k, v in state.items()},
    "model": lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {}}},
    "state_dict": lambda state: {"state_dict": state, "arch": "contnet"},
    "compiled": lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    "numpy's numbers": lambda state: {"model": state, "best_acc1": np.float64(7), "n": np.int64(3)},
    "in the bare dict": lambda state: {**state, "epoch": 3},
}


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_known_shapes_of_a_checkpoint(convert, wrapping, relative):
    state = dict(make_oracle("contnet_ti", relative=relative).state_dict())
    path, _ = convert(WRAPPINGS[wrapping](state))
    assert_same(load(path)[0], contnet.convert_state_dict(state)[0])


def test_the_average_of_torchvisions_scripts(convert):
    last, average = (torchvision.models.resnet18(num_classes=3).state_dict() for _ in range(2))
    average_file = {f"module.{k}": v for k, v in average.items()}
    content = {"model": last, "model_ema": {"n_averaged": torch.tensor(5), **average_file}}
    path, lines = convert(content, "--to", "timm")
    assert_same(load(path)[0], average)
    assert any(line.startswith("dropped  n_averaged") for line in lines)


class Code:
    """Creates a file if it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


FILES = {
    "a VGG": lambda p: torch.save({k: torch.zeros(v.shape) for k, v in vgg().items()}, p),
    "text": lambda p: p.write_text("These are no weights.\n" * 9),
    "empty": lambda p: p.write_bytes(b""),
    "cut short": lambda p: (torch.save(ours(), p), p.write_bytes(p.read_bytes()[:100_000])),
    "code": lambda p: torch.save({"model": Code(p.with_name("ran"))}, p),
    "bare code": lambda p: p.write_bytes(pickle.dumps(Code(p.with_name("ran")))),
    "a list": lambda p: torch.save([torch.zeros(1)], p),
    "nothing": lambda p: torch.save({}, p),
    "no tensors": lambda p: torch.save({"model": {"a": 1}}, p),
    "another variant's tensor": lambda p: torch.save(
        {**ours(), "stages.1.0.conv.weight": torch.zeros(3, 3)}, p
    ),
    "one missing": lambda p: torch.save(
        {k: v for k, v in ours().items() if k != "stages.1.0.conv.weight"}, p
    ),
    "half a head": lambda p: torch.save({k: v for k, v in ours().items() if k != "head.bias"}, p),
    "not finite": lambda p: torch.save({**ours(), "head.bias": torch.full((1000,), torch.nan)}, p),
    "quantised": lambda p: torch.save({k: v.char() for k, v in ours().items()}, p),
    "two networks": lambda p: torch.save(
        {f"{side}.{k}": v for k, v in ours().items() for side in ("student", "teacher")}, p
    ),
    "the same twice": lambda p: torch.save({**ours(), "module.stem.weight": torch.zeros(1)}, p),
    "a DeiT": lambda p: torch.save(
        {"model": {f"network.{k}": v for k, v in deit().items()}, "iteration": 3}, p
    ),
}


def vgg():
    with torch.device("meta"):
        return torchvision.models.vgg11().state_dict()


def deit():
    return timm.create_model("deit_tiny_patch16_224").state_dict()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@pytest.mark.parametrize("kind", FILES)
def test_foreign_files_are_one_line_and_nothing_is_written(refuse, tmp_path, kind, suffix):
    path = tmp_path / f"source{suffix}"
    FILES[kind](path)
    assert str(path) in refuse(path)
    assert not (tmp_path / "ran").exists()


NAMED = {
    "a VGG": "features.0.weight",
    "one missing": "stages.1.0.conv.weight",
    "half a head": "head.bias",
    "not finite": "head.bias is not finite",
    "quantised": "stem.weight is torch.int8: it is quantised",
    "two networks": "several networks (student.stem.weight, teacher.stem.weight)",
    "another variant's tensor": "stages.1.0.conv.weight has shape (3, 3)",
    "code": "could run code",
}


@pytest.mark.parametrize("kind", NAMED)
def test_a_refusal_names_what_is_wrong(refuse, tmp_path, kind):
    FILES[kind](tmp_path / "source.pth")
    assert NAMED[kind] in refuse(tmp_path / "source.pth")


def test_a_model_that_is_an_object_says_what_to_do(refuse):
    error = refuse({"model": torch.nn.Linear(2, 2), "epoch": 3})
    assert "torch.nn.modules.linear.Linear" in error
    assert "model.state_dict()" in error


def test_numbers_and_arrays_of_numpy_are_read_as_they_are(tmp_path):
    path = tmp_path / "a.pth"
    curves = {"c": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.ones((2, 3), ">i2"))}
    rest = {"best": np.float64(1.5), "n": np.int64(3), "names": np.array(["a", "bc"]), **curves}
    torch.save({"model": {"w": torch.ones(1)}, **rest}, path)
    found = read_weights(str(path)).rest
    assert found["best"] == 1.5 and found["n"] == 3 and list(found["names"]) == ["a", "bc"]
    for name, value in curves.items():
        assert (
            np.array_equal(found[name], value)
            and found[name].dtype.itemsize == value.dtype.itemsize
        )


ODD_NAMES = {
    "escapes": "\x1b[31mred\x1b]0;title\x07",
    "lines": "a\nerror: b\r\u2028c",
    "another direction": "a\u202eb\u2066c",
    "half a character": "a\udc80",
    "ten megabytes": "x" * 10**7,
}


@pytest.mark.parametrize("kind", ODD_NAMES)
def test_names_in_a_file_are_shown_as_one_line(convert, refuse, tmp_path, kind):
    name = ODD_NAMES[kind]
    torch.save({name: torch.zeros(1)}, tmp_path / "first.pth")
    error = refuse(tmp_path / "first.pth")
    assert error[:-1].isprintable() and len(error) < 2000
    for state in (make_oracle("contnet_ti").state_dict(), ours()):
        _, lines = convert({"model": {**state, name: "no tensor"}, name: 1})
        for line in lines:
            assert line.isprintable() and len(line) < 2000
