"""Runs tools/convert_weights.py, makes weights for it, and checks its results."""

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from conftest import QUICK, REPOSITORY, SMALL
from oracle import make_oracle

import contnet
from contnet.checkpoint.content import read_content
from contnet.checkpoint.key_mapping import locate_networks
from contnet.commands import convert_weights as weights
from contnet.config import load_config
from contnet.modeling.build import build_model

CONTNET, RESNET = "faster_rcnn_contti.yaml", "faster_rcnn_r50.yaml"
ALL = {"relative": True, "pre_norm": True, "use_avgdown": True, "qkv_bias": False}


def chosen(mask):
    """Returns the options whose bits are set."""
    return {k: v for i, (k, v) in enumerate(ALL.items()) if mask >> i & 1}


COUNT = "num_batches_tracked"


def as_file(source, folder):
    """Returns the path of a file, which is written first if ``source`` is its content."""
    if not isinstance(source, (str, Path)):
        torch.save(source, folder / "source.pth")
        source = folder / "source.pth"
    return str(source)


def told(source, options):
    """Adds --no-pre-norm to the options if source is the content of a file with a ConTNet."""
    if isinstance(source, (str, Path)) or any(option.endswith("pre-norm") for option in options):
        return options
    names = [
        str(name) for part in (source, *source.values()) if isinstance(part, dict) for name in part
    ]
    forms = [form for form, _ in locate_networks(names)]
    return [*options, "--no-pre-norm"] if {"contnet", "authors"} & set(forms) else options


@pytest.fixture
def convert(tmp_path, capsys):
    """Runs the tool on a file or content; returns the path of the result and the output lines."""

    def run(source, *options, target="result.pth"):
        options = told(source, options)
        status = weights.main([as_file(source, tmp_path), str(tmp_path / target), *options])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        lines = captured.out.splitlines()
        return Path(lines[-1]), lines

    return run


@pytest.fixture
def refuse(tmp_path, capsys):
    """Runs the tool, which must fail; returns its error line."""

    def run(source, *options, target="result.pth"):
        options = told(source, options)
        source = as_file(source, tmp_path)
        before = sorted(tmp_path.rglob("*"))
        assert weights.main([source, str(tmp_path / target), *options]) in (1, 2)
        assert sorted(tmp_path.rglob("*")) == before
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return run


def load(path):
    """Returns the tensors and metadata of a result."""
    with open(path, "rb") as file:
        content = read_content(file, str(path))
    return content["model"], content["contnet"]


def rebuilt(path):
    """Builds the network that the metadata of a result describe, with its weights."""
    tensors, metadata = load(path)
    model = contnet.create_model(metadata["network"], **metadata["options"])
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def assert_same(a, b):
    """Checks for the same names, except the norms' counts, and bit-equal tensors."""
    a, b = ({k: v for k, v in x.items() if not k.endswith(COUNT)} for x in (a, b))
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@lru_cache(maxsize=4)
def _ours(name, options):
    return contnet.convert_state_dict(make_oracle(name, **dict(options)).state_dict())[0]


def ours(name="contnet_ti", **options):
    """Returns a state dict in which no tensor is constant; callers must not change the tensors."""
    return dict(_ours(name, tuple(options.items())))


def shaken(model):
    """Returns the network with norms that are not the identity; its outputs stay small."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
            torch.nn.init.uniform_(module.weight, 0.3, 0.5)
            torch.nn.init.uniform_(module.bias, -0.1, 0.1)
    return model.eval()


def make_detector(leaf, *options):
    """Builds a small model with random weights."""
    small = QUICK if leaf.startswith("imagenet/") else SMALL
    return build_model(load_config(str(REPOSITORY / "configs" / leaf), [*small, *options]))
