"""Tests files of weights that ``timm.create_model`` loads."""

from functools import partial

import pytest
import safetensors.torch
import timm
import torch

import contnet
from contnet.utils.errors import UserError


def image(channels=3):
    """Returns a fixed random input."""
    return torch.randn(1, channels, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained():
    """Returns a network with random weights."""
    torch.manual_seed(7)
    return contnet.create_model("contnet_ti", num_classes=10, relative=True).eval()


load = partial(timm.create_model, "contnet_ti", pretrained=True, relative=True)


def _save(state, path, form):
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    elif form == "parallel":
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize(
    ("form", "suffix"),
    [("plain", "pth"), ("parallel", "pth"), ("safetensors", "safetensors")],
)
@torch.no_grad()
def test_a_file_is_loaded(trained, tmp_path, form, suffix):
    path = str(tmp_path / f"weights.{suffix}")
    _save(trained.state_dict(), path, form)
    model = load(num_classes=10, pretrained_cfg_overlay={"file": path}).eval()
    assert torch.equal(model(image()), trained(image()))
    # With other classes or none, the head is new and the rest is from the file.
    other = load(num_classes=5, pretrained_cfg_overlay={"file": path}).eval()
    bare = load(num_classes=0, pretrained_cfg_overlay={"file": path}).eval()
    assert other(image()).shape == (1, 5)
    for each in (other, bare):
        assert torch.equal(each.forward_features(image()), trained.forward_features(image()))
    features = load(features_only=True, pretrained_cfg_overlay={"file": path}).eval()
    for got, expected in zip(
        features(image()), trained.forward_intermediates(image())[1], strict=True
    ):
        assert torch.equal(got, expected)


@torch.no_grad()
def test_a_file_serves_another_number_of_channels(trained, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    overlay = {"file": tmp_path / "w.pth"}
    model = load(num_classes=10, in_chans=1, pretrained_cfg_overlay=overlay).eval()
    grey = image(channels=1)
    torch.testing.assert_close(model(grey), trained(grey.expand(-1, 3, -1, -1)))


def test_files_that_do_not_fit_are_refused(trained, tmp_path):
    overlay = {"file": tmp_path / "w.pth"}
    with pytest.raises(UserError, match=r"w\.pth is not a file"):
        load(pretrained_cfg_overlay=overlay)
    state = trained.state_dict()
    torch.save(state, tmp_path / "w.pth")
    for wrong in ({"use_avgdown": True}, {"relative": False}):
        for features_only in (False, True):
            with pytest.raises(UserError, match=r"w\.pth") as caught:
                load(pretrained_cfg_overlay=overlay, features_only=features_only, **wrong)
            assert "\n" not in str(caught.value)
    del state["stages.0.0.norm.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"stages\.0\.0\.norm\.weight"):
        load(num_classes=10, pretrained_cfg_overlay=overlay)


def test_what_a_file_says_of_its_network_is_compared(trained, tmp_path):
    """The tensors fit in both cases."""
    options = {"relative": True, "pre_norm": True}
    said = {"format": 1, "network": "contnet_ti", "options": options}
    torch.save({"model": trained.state_dict(), "contnet": said}, tmp_path / "w.pth")
    overlay = {"file": tmp_path / "w.pth"}
    load(pre_norm=True, num_classes=10, pretrained_cfg_overlay=overlay)
    with pytest.raises(UserError, match="PRE_NORM True"):
        load(num_classes=10, pretrained_cfg_overlay=overlay)
