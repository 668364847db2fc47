"""Tests the network's interface for timm: layer groups, names, heads, features."""

import math

import pytest
import torch
from pairs import (
    NAMES,
    OUTPUTS,
    PRE_CHANNELS,
    STAGE_CHANNELS,
    case_label,
    choices,
    difference,
    image,
    pair,
)
from torch import nn

import contnet


def our_groups(model, coarse):
    """Returns the layer number of every parameter, as timm reads the model's matcher."""
    models = pytest.importorskip("timm.models")
    return models.group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)


@pytest.mark.parametrize("name", NAMES)
def test_layer_groups_are_ordered_and_complete(name):
    theirs, model = pair(name)
    _, report = contnet.convert_state_dict(theirs.state_dict())
    for coarse in (False, True):
        groups = our_groups(model, coarse)
        assert set(groups) == {n for n, _ in model.named_parameters()}
        order = {}
        for key, ours in report.mapped.items():
            if ours in groups:
                parts = key.split(".")[: 1 if coarse else 2]
                part = ".".join(p for p in parts if p.startswith(("layer", "ConTBlock", "fc")))
                order.setdefault(part, set()).add(groups[ours])
        assert all(len(numbers) == 1 for numbers in order.values()), order
        numbers = [n.copy().pop() for n in order.values()]
        assert numbers == sorted(set(numbers)), order


def test_timm_layer_decay_scales_by_depth():
    optim = pytest.importorskip("timm.optim")
    model = contnet.create_model("contnet_m")
    groups = optim.param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    first, *_, last = model.parameters()
    assert scale[id(last)] == 1
    assert scale[id(first)] == min(scale.values())
    free = model.no_weight_decay()
    for key, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0 if key in free else 0.05), key


def test_timm_lists_and_creates():
    timm = pytest.importorskip("timm")
    assert timm.list_models("contnet*") == sorted(NAMES)
    model = timm.create_model("contnet_m", num_classes=12, relative=True)
    ours = contnet.create_model("contnet_m", num_classes=12, relative=True)
    assert type(model) is type(ours)
    assert model.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize("name", NAMES)
def test_timm_pretrained_and_unknown_options_raise(name):
    timm = pytest.importorskip("timm")
    for create in (timm.create_model, contnet.create_model):
        with pytest.raises((RuntimeError, ValueError, TypeError), match=r"(?i)pretrained|weights"):
            create(name, pretrained=True)
        with pytest.raises(TypeError):
            create(name, no_such_option=3)


@torch.no_grad()
def test_timm_head_conventions():
    timm = pytest.importorskip("timm")
    model = timm.create_model("contnet_ti").eval()
    x = image(64)
    assert model.num_classes == 1000
    assert model.num_features == 768
    assert model.forward_features(x).shape == (1, 768, 2, 2)
    features = model.forward_features(x)
    assert model.forward_head(features, pre_logits=True).shape == (1, 768)
    assert difference(model.forward_head(features), model(x)) < 1e-6
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(5)
    assert (model.num_classes, model(x).shape) == (5, (1, 5))
    model.reset_classifier(0)
    assert (model.num_classes, model(x).shape) == (0, (1, 768))
    assert model.forward_features(x).shape == (1, 768, 2, 2)


@torch.no_grad()
@pytest.mark.parametrize("taps", ["stage", "pre"])
@pytest.mark.parametrize(
    ("name", "indices"),
    choices([None, (0, 1, 2, 3), (1, 3), (-1,)], [None, (1, 3)], [None]),
    ids=case_label,
)
def test_timm_features_only(name, indices, taps):
    timm = pytest.importorskip("timm")
    chosen = {} if indices is None else {"out_indices": indices}
    model = timm.create_model(name, features_only=True, taps=taps, **chosen).eval()
    positions = [i % 4 for i in indices or (0, 1, 2, 3)]
    channels = (STAGE_CHANNELS if taps == "stage" else PRE_CHANNELS)[name]
    assert model.feature_info.channels() == [channels[i] for i in positions]
    assert model.feature_info.reduction() == [(4, 8, 16, 32)[i] for i in positions]
    size = (61, 90)
    maps = model(image(*size))
    assert len(maps) == len(positions)
    for features, i in zip(maps, positions, strict=True):
        expected = (1, channels[i], *(math.ceil(s / (4 * 2**i)) for s in size))
        assert features.shape == expected


@torch.no_grad()
def test_timm_features_equal_ours():
    timm = pytest.importorskip("timm")
    torch.manual_seed(5)
    model = timm.create_model("contnet_ti", features_only=True).eval()
    torch.manual_seed(5)
    ours = contnet.create_model("contnet_ti").eval()
    x = image(61, 90)
    expected = ours.forward_features(x, out_features=list(OUTPUTS))
    for got, key in zip(model(x), OUTPUTS, strict=True):
        assert difference(got, expected[key]) < 1e-5
