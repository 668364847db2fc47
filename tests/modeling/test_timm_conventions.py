"""Tests timm's own checks of every network, and torchvision's of a backbone."""

from functools import partial

import pytest
import timm
import torch
from timm.models import FeatureInfo
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor

import contnet
from contnet.modeling.contnet import OUTPUT_STRIDES, TAPS, VARIANTS

SIZE = (64, 96)
CLASSES = ("getter", "hook", "list", "dict", "fx")
FLAGS = {"relative": True, "pre_norm": True, "use_avgdown": True, "qkv_bias": False}

variants = pytest.mark.parametrize("name", sorted(VARIANTS))
# TorchScript is deprecated in PyTorch and warns.
scripts = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*TorchScript:UserWarning"
)


def create(name, **options):
    """Creates a network with timm in evaluation mode, always with the same weights."""
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


def image(*size, batch=1, channels=3):
    """Returns a fixed random input."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *(size or SIZE), generator=generator)


def assert_close(got, expected):
    """Checks for equality except rounding in another order."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def assert_every_gradient(model):
    """Checks that every parameter has a finite gradient."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


# --- forward and backward ------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward(name, dtype):
    model = create(name).to(dtype)
    with torch.no_grad():
        out = model(image().to(dtype))
    assert out.shape == (1, 1000)
    assert out.dtype == dtype and out.isfinite().all()


@variants
def test_backward(name):
    model = create(name, num_classes=42).train()
    out = model(image(batch=2))
    assert out.shape == (2, 42)
    out.mean().backward()
    assert_every_gradient(model)


@variants
def test_checkpointed_backward(name):
    model = create(name, num_classes=5).train()
    model.set_grad_checkpointing()
    model(image(batch=2)).square().mean().backward()
    assert_every_gradient(model)


@variants
def test_parameter_groups(name):
    model = create(name)
    decayed = {id(p) for p in param_groups_weight_decay(model, 0.1)[1]["params"]}
    for key, parameter in model.named_parameters():
        if key in model.no_weight_decay():
            assert (id(parameter) in decayed) == (parameter.ndim > 1), key
    groups = param_groups_layer_decay(model, 0.1, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


# --- configuration and head ----------------------------------------------------------------------


@variants
@torch.no_grad()
def test_default_configuration(name):
    model = create(name)
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg["first_conv"] + ".weight" in state and cfg["classifier"] + ".weight" in state
    x = image(*cfg["input_size"][1:])
    features = model.forward_features(x)
    pooled = (1, model.num_features)
    assert features.shape == (*pooled, *cfg["pool_size"])
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(x).shape == pooled
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(0)
    assert torch.equal(model(x), features), "the present pooling stays"
    model.reset_classifier(7, "avg")
    assert model(x).shape == (1, 7)


@variants
@torch.no_grad()
def test_pooling_of_the_factory(name):
    assert create(name, num_classes=0)(image()).shape == (1, create(name).num_features)
    bare = create(name, num_classes=0, global_pool="")
    assert torch.equal(bare(image()), bare.forward_features(image()))


def test_other_poolings_are_refused():
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        create("contnet_ti", num_classes=0, global_pool="max")
    with pytest.raises(ValueError, match="num_classes 10"):
        create("contnet_ti", num_classes=10, global_pool="")
    model = create("contnet_ti")
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        model.reset_classifier(5, "max")
    assert model(image()).shape == (1, 1000)


# --- features ------------------------------------------------------------------------------------


def _features(model, x):
    out = model(x)
    return list(out.values()) if isinstance(out, dict) else out


@variants
@pytest.mark.parametrize("feature_cls", CLASSES)
@torch.no_grad()
def test_features_only(name, feature_cls):
    model = create(name, features_only=True, feature_cls=feature_cls)
    maps = _features(model, image())
    info = model.feature_info
    assert len(maps) == len(info.channels()) == 4
    for each, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert each.shape == (1, channels, *(side // reduction for side in SIZE))
    expected = (4, 8, 16, 32) if feature_cls == "getter" else (8, 16, 32, 32)
    assert tuple(info.reduction()) == expected
    assert_close(maps[-1], create(name).forward_features(image()))


@pytest.mark.parametrize("output_stride", OUTPUT_STRIDES)
@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("indices", [(1, 3), (-3, -2), (0,), 2], ids=str)
@pytest.mark.parametrize("feature_cls", CLASSES)
@torch.no_grad()
def test_chosen_features(feature_cls, indices, taps, output_stride):
    make = partial(
        create,
        "contnet_ti",
        features_only=True,
        feature_cls=feature_cls,
        out_indices=indices,
        taps=taps,
        output_stride=output_stride,
    )
    if taps == "pre" and feature_cls not in ("getter", "hook"):
        with pytest.raises(ValueError, match="taps='pre'"):
            make()
        return
    model = make()
    shapes = [(each.shape[1], SIZE[0] // each.shape[2]) for each in _features(model, image())]
    info = model.feature_info
    told = list(zip(info.channels(), info.reduction(), strict=True))
    assert shapes == told
    assert len(shapes) == (indices if isinstance(indices, int) else len(indices))


@torch.no_grad()
def test_hooked_taps_are_those_of_the_getter():
    hooked, getter = (
        create("contnet_m", features_only=True, feature_cls=each, taps="pre")
        for each in ("hook", "getter")
    )
    for got, expected in zip(hooked(image()), getter(image()), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize(
    "wrong", [{"out_indices": (4,)}, {"out_indices": (0, -5)}, {"feature_cls": "other"}], ids=str
)
@pytest.mark.parametrize("feature_cls", CLASSES)
def test_features_that_there_are_not_are_refused(feature_cls, wrong):
    with pytest.raises((ValueError, IndexError, AssertionError)):
        create("contnet_ti", features_only=True, **{"feature_cls": feature_cls, **wrong})


@torch.no_grad()
def test_only_the_getter_gives_another_order():
    make = partial(create, "contnet_ti", features_only=True, out_indices=(3, -4))
    model = make()
    assert [each.shape[1] for each in model(image())] == model.feature_info.channels() == [768, 96]
    for feature_cls in CLASSES[1:]:
        with pytest.raises(ValueError, match="order of the stages"):
            make(feature_cls=feature_cls)


@pytest.mark.parametrize("feature_cls", ["hook", "list", "dict"])
def test_checkpointed_features(feature_cls):
    gradients = []
    for enable in (False, True):
        model = create("contnet_s", features_only=True, feature_cls=feature_cls).train()
        model.set_grad_checkpointing(enable)
        sum(each.square().mean() for each in _features(model, image(batch=2))).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@variants
@pytest.mark.parametrize("taps", TAPS)
@torch.no_grad()
def test_forward_intermediates(name, taps):
    model = create(name, taps=taps)
    x = image()
    last, maps = model.forward_intermediates(x)
    assert_close(last, model.forward_features(x))
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    for each, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert each.shape == (1, channels, *(side // reduction for side in SIZE))
    as_dict = model.forward_intermediates(x, output_dict=True)
    assert as_dict.keys() == {"image_features", "image_intermediates"}
    assert torch.equal(as_dict["image_features"], last)
    only = model.forward_intermediates(x, intermediates_only=True)
    only_dict = model.forward_intermediates(x, intermediates_only=True, output_dict=True)
    assert only_dict.keys() == {"image_intermediates"}
    for got in (as_dict["image_intermediates"], only, only_dict["image_intermediates"]):
        assert all(torch.equal(a, b) for a, b in zip(got, maps, strict=True))


@torch.no_grad()
def test_forward_intermediates_takes_indices_as_timm_does():
    model = create("contnet_ti")
    x = image()
    _, maps = model.forward_intermediates(x)
    for indices, expected in ((2, [2, 3]), ([1, -1], [1, 3]), ([0], [0])):
        _, some = model.forward_intermediates(x, indices)
        for got, i in zip(some, expected, strict=True):
            assert_close(got, maps[i])
    last, (tap,) = model.forward_intermediates(x, [1], stop_early=True)
    assert_close(last, model.stages[:2](model.pool(model.stem(x))))
    assert_close(last, tap[..., ::2, ::2])
    for wrong in (0, 5, [4], [-5], []):
        with pytest.raises(ValueError, match="indices"):
            model.forward_intermediates(x, wrong)
    assert model.prune_intermediate_layers([-3]) == [1]
    with pytest.raises(ValueError, match="stages 0 to 1"):
        model.forward_intermediates(x, [2])


@variants
@torch.no_grad()
def test_feature_info_names_modules_that_are_called(name):
    for taps in TAPS:
        model, called = create(name, taps=taps), {}
        names = {model.get_submodule(info["module"]): info["module"] for info in model.feature_info}

        def note(module, args, out, names=names, called=called):
            called[names[module]] = (args[0], out)

        for module in names:
            module.register_forward_hook(note)
        model(image())
        for info in model.feature_info:
            seen = called[info["module"]][info.get("hook_type") != "forward_pre"]
            assert seen.shape[1] == info["num_chs"]


# --- torch.fx, TorchScript -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in sorted(VARIANTS)),
        ("contnet_ti", FLAGS),
        ("contnet_ti", {"output_stride": 8, "dilated_patches": False}),
        ("contnet_ti", {"output_stride": 16, "use_avgdown": True}),
    ],
    ids=str,
)
@torch.no_grad()
def test_forward_fx(name, options):
    model = create(name, **options)
    traced = torch.fx.symbolic_trace(model)
    extracted = create_feature_extractor(model, {"head": "logits"})
    # Traced without a size, it accepts any.
    for size in (SIZE, (61, 90), (224, 224)):
        assert_close(traced(image(*size)), model(image(*size)))
    assert_close(extracted(image())["logits"], model(image()))


@variants
def test_backward_fx(name):
    model = create(name, num_classes=42).train()
    traced = torch.fx.symbolic_trace(model)
    traced(image(batch=2)).mean().backward()
    assert_every_gradient(traced)


@pytest.mark.parametrize("taps", TAPS)
@torch.no_grad()
def test_taps_fx(taps):
    options = dict(VARIANTS["contnet_ti"], taps=taps, use_avgdown=True)

    class Taps(contnet.ConTNet):
        def forward(self, x):
            return self.forward_features(x, ["res2", "res5"])

    model = Taps(**options).eval()
    got, expected = torch.fx.symbolic_trace(model)(image(61, 90)), model(image(61, 90))
    assert_close(got, expected)


@variants
@scripts
@torch.no_grad()
def test_forward_torchscript(name):
    for options in ({}, FLAGS) if name == "contnet_ti" else ({},):
        model = create(name, **options)
        scripted = torch.jit.script(model)
        for size in (SIZE, (61, 90)):
            assert_close(scripted(image(*size)), model(image(*size)))


@scripts
def test_scripted_network_trains_and_saves(tmp_path):
    scripted = torch.jit.script(create("contnet_ti", num_classes=5).train())
    scripted(image(batch=2)).mean().backward()
    assert_every_gradient(scripted)
    scripted.eval().save(str(tmp_path / "contnet.pt"))
    assert_close(torch.jit.load(str(tmp_path / "contnet.pt"))(image()), scripted(image()))


@scripts
@torch.no_grad()
def test_forward_fx_torchscript():
    model = create("contnet_ti")
    scripted = torch.jit.script(torch.fx.symbolic_trace(model))
    assert_close(scripted(image(61, 90)), model(image(61, 90)))


# --- torchvision ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_pyramid_of_torchvision():
    body = create("contnet_ti", features_only=True, feature_cls="list")
    names = {f"stages_{i}": str(i) for i in range(4)}
    pyramid = BackboneWithFPN(body, names, body.feature_info.channels(), 16).eval()
    shapes = [each.shape for each in pyramid(image()).values()]
    strides = (*body.feature_info.reduction(), 64)
    assert shapes == [(1, 16, SIZE[0] // s, -(-SIZE[1] // s)) for s in strides]


@torch.no_grad()
def test_children_run_in_order():
    model = create("contnet_ti", num_classes=0, global_pool="")
    assert_close(nn.Sequential(*model.children())(image()), model(image()))
