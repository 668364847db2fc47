"""Files and networks that are foreign: refused in one line, never run."""

import fractions
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
    """Would leave a file behind if it were unpickled."""

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
    "quantised": "stem.weight holds torch.int8: it is quantised",
    "two networks": "several networks (student.stem.weight, teacher.stem.weight)",
    "another variant's tensor": "stages.1.0.conv.weight has shape (3, 3)",
    "code": "could run code",
}


@pytest.mark.parametrize("kind", NAMED)
def test_a_refusal_names_what_is_wrong(refuse, tmp_path, kind):
    FILES[kind](tmp_path / "source.pth")
    assert NAMED[kind] in refuse(tmp_path / "source.pth")


def test_a_checkpoint_with_objects_says_what_to_do(refuse):
    content = {"model": ours(), "args": fractions.Fraction(1, 3)}
    error = refuse(content)
    assert "(fractions.Fraction)" in error
    assert "weights_only=False" in error


def test_numpy_may_bring_numbers_and_arrays_but_no_objects(refuse, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": ours(), "best": np.float64(1), "curve": np.zeros(3)}, path)
    assert read_weights(str(path)).rest["curve"].shape == (3,)
    assert "weights_only" in refuse({"model": ours(), "a": np.array([fractions.Fraction(1, 3)])})
    assert "numpy" in refuse({"model": ours(), "best": np.datetime64("2026-01-01")})
