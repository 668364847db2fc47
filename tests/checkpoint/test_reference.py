"""Tests runs of the authors' tensors, and comparisons of a source with its result."""

import pytest
import torch
from conversions import chosen, ours
from oracle import make_oracle

import contnet
from contnet.checkpoint.convert import EXPORTS
from contnet.checkpoint.reference import RUNNERS

pytest_plugins = ["conversions"]


@pytest.mark.parametrize("mask", range(0, 16, 3))
@torch.no_grad()
def test_every_form_of_a_contnet_computes_the_same(mask):
    """The two implementations of the network share only the tensors."""
    options = chosen(mask)
    theirs = make_oracle("contnet_ti", num_classes=5, **options)
    state = dict(theirs.state_dict())
    converted, _ = contnet.convert_state_dict(state)
    # As in some files.
    bare = {k: v for k, v in state.items() if not k.endswith(("_index", "_tracked"))}
    options["num_classes"] = 5
    for size in ((224, 224), (97, 131)):
        image = torch.randn(1, 3, *size)
        expected = RUNNERS["authors"]("contnet_ti", options, bare, image)
        assert torch.equal(expected[1], theirs(image))
        for form in ("contnet", "timm"):
            found = RUNNERS[form]("contnet_ti", options, converted, image)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_weights_without_a_head_give_the_mean():
    state = make_oracle("contnet_ti", num_classes=0).state_dict()
    half = {name: value.half() for name, value in state.items()}
    features, mean = RUNNERS["authors"](
        "contnet_ti", {"num_classes": 0}, half, torch.randn(1, 3, 64, 64)
    )
    assert features.dtype == torch.float32 and features.shape == (1, 768, 2, 2)
    assert torch.equal(mean, features.mean((2, 3)))


@pytest.mark.parametrize("head", ["drop", "4"])
def test_check_with_another_head_compares_the_last_map(convert, head):
    _, lines = convert(ours(), "--head", head, "--check", "--to", "authors")
    assert all("last map at" in line for line in lines if line.startswith("check"))


def exchange(first, second):
    """Swaps two tensors, as a mistake in a table of names would."""

    def wrong(export):
        def make(state):
            state = dict(export(state))
            shapes = state[first].shape, state[second].shape
            values = state[second].reshape(shapes[0]), state[first].reshape(shapes[1])
            state[first], state[second] = values
            return state

        return make

    return wrong


SLIPS = {
    "norms": ("contnet", "stages.0.0.encoders.0.{}", "norm1.weight", "norm2.weight"),
    "tables": ("authors", "layer4.ConTBlock0.ste2.{}", "pe.0", "pe.1"),
    "encoders": ("contnet", "stages.3.0.{}", "encoders.0.attn.proj.bias", "encoders.1.norm2.bias"),
}


@pytest.mark.parametrize("target", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("slip", SLIPS)
def test_check_finds_a_wrong_result(refuse, monkeypatch, slip, target):
    form, place, *names = SLIPS[slip]
    wrong = exchange(*(place.format(name) for name in names))
    monkeypatch.setitem(EXPORTS, form, wrong(EXPORTS[form]))
    state = make_oracle("contnet_ti").state_dict() if form == "contnet" else ours()
    to = "authors" if form == "authors" else "detectron2"
    assert "source and result differ by" in refuse(state, "--check", "--to", to, target=target)
