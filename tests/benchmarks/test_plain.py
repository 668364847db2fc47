"""Tests the network against the plain implementation, forward and backward."""

import pytest
import torch
from networks import difference, images, randomised
from oracle import VARIANTS

from benchmarks.plain import run_plain
from contnet.modeling import block

FLAGS = {"relative": True, "pre_norm": True, "use_avgdown": True, "qkv_bias": False}
OPTIONS = [{}, *({flag: value} for flag, value in FLAGS.items()), FLAGS]
SIZES = [(224, 224), (224, 448)]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_options_forward(options, size):
    model = randomised("contnet_ti", **options).eval()
    x = images(size)
    assert difference(model(x), run_plain(model, x)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variants_forward(name):
    model = randomised(name).eval()
    x = images((224, 224), batch=1)
    assert difference(model(x), run_plain(model, x)) < 1e-5


@pytest.mark.parametrize("options", [{}, FLAGS], ids=["default", "all options"])
def test_gradients(options):
    model = randomised("contnet_ti", torch.float64, **options).train()
    x = images((224, 224), dtype=torch.float64).requires_grad_()
    weights = torch.linspace(-1, 1, 20, dtype=torch.float64).view(2, 10)
    taken = {}
    for name, run in {"plain": lambda x: run_plain(model, x), "fast": model}.items():
        wanted = [x, *model.parameters()]
        taken[name] = torch.autograd.grad((run(x) * weights).sum(), wanted)
    for ours, theirs in zip(taken["fast"], taken["plain"], strict=True):
        # The gradients of convolutions after a constant shift are only rounding errors.
        scale = theirs.abs().max().clamp(min=1e-6)
        assert ((ours - theirs).abs().max() / scale).item() < 1e-10


@pytest.mark.parametrize("size", [(224, 448), (330, 500)], ids=str)
def test_a_cpu_encodes_in_parts(monkeypatch, size):
    model = randomised("contnet_ti", torch.float64).train()
    x = images(size, dtype=torch.float64)

    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    monkeypatch.setattr(block, "CPU_CHUNK_ELEMENTS", 10**12)
    at_once = gradients()
    calls = []
    encoder = model.stages[0][0].encoders[0]
    encoder.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[0]))
    monkeypatch.setattr(block, "CPU_CHUNK_ELEMENTS", 10_000)
    for ours, whole in zip(gradients(), at_once, strict=True):
        assert difference(ours, whole) < 1e-10
    assert len(calls) > 10 and set(calls[:-1]) == {1}


def test_plain_pads_an_image_as_a_whole():
    model = randomised("contnet_ti").eval()
    x = images((200, 230))
    with torch.no_grad():
        padded = torch.nn.functional.pad(x, (0, 218, 0, 24))
        assert difference(run_plain(model, x), run_plain(model, padded)) < 1e-6
