"""Tests hooks on modules and replaced modules, which adapters and counters use."""

import pytest
import torch
from pairs import FLAGS, NAMES, OUTPUTS, SINGLES, image, label
from torch import nn

import contnet
from contnet.modeling.backbone import ConTNetBackbone
from contnet.modeling.contnet import GRAD_CHECKPOINTING_MODES, TAPS, VARIANTS

OPTIONS = [*SINGLES, {"output_stride": 8}, {"output_stride": 16, **FLAGS}]


def hooked(model):
    """Returns a list that hooks fill with the names of the convolutions that run."""
    called = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):

            def note(module, args, out, name=name):
                # The reported output is a convolution of the reported input.
                torch.testing.assert_close(out, module._conv_forward(*args, module.weight, None))
                called.append(name)

            module.register_forward_hook(note)
    return called


def convolutions(model):
    """Returns the names of all convolutions."""
    return sorted(name for name, m in model.named_modules() if isinstance(m, nn.Conv2d))


def strided(model):
    """Returns the names of the convolutions that the dense taps run at stride 1 instead."""
    blocks = [f"stages.{i}.{len(stage) - 1}." for i, stage in enumerate(model.stages)]
    return [
        name
        for name in convolutions(model)
        if name.startswith(tuple(blocks)) and model.get_submodule(name).stride == (2, 2)
    ]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in NAMES] + [("contnet_ti", options) for options in OPTIONS[1:]],
    ids=lambda value: value if isinstance(value, str) else label(value),
)
def test_every_convolution_runs_as_a_module(name, options):
    for taps in TAPS:
        model = contnet.create_model(name, taps=taps, **options).eval()
        called = hooked(model)
        calls = {
            "logits": lambda model=model: model(image(61, 90)),
            "map": lambda model=model: model.forward_features(image(61, 90)),
            "features": lambda model=model: model.forward_features(image(61, 90), OUTPUTS),
            "intermediates": lambda model=model: model.forward_intermediates(image(61, 90)),
        }
        for what, call in calls.items():
            called.clear()
            call()
            expected = convolutions(model)
            if taps == "stage" and what in ("features", "intermediates"):
                expected = sorted({*expected} - {*strided(model)})
            assert sorted(called) == expected, (taps, what)


@pytest.mark.parametrize("part", GRAD_CHECKPOINTING_MODES)
def test_hooks_run_with_activation_checkpointing(part):
    model = contnet.create_model("contnet_m", num_classes=3).train()
    model.set_grad_checkpointing(part)
    called = hooked(model)
    model(image(64, batch=2)).sum()
    assert sorted(called) == convolutions(model)


def test_convolutions_of_a_backbone_run_as_modules():
    backbone = ConTNetBackbone(**VARIANTS["contnet_s"], taps="pre", norm="FrozenBN").eval()
    called = hooked(backbone)
    backbone(image(64))
    assert sorted(called) == convolutions(backbone)


@torch.no_grad()
def test_every_module_puts_out_a_tensor():
    model = contnet.create_model("contnet_m", use_avgdown=True).eval()
    silent = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            silent.add(name)

            def note(module, args, out, name=name):
                assert isinstance(out, torch.Tensor)
                silent.discard(name)

            module.register_forward_hook(note)
    model(image(61, 90))
    assert not silent


def test_a_stage_has_maps_and_gradients_for_grad_cam():
    model = contnet.create_model("contnet_ti").eval()
    kept = {}
    model.stages[2].register_forward_hook(lambda m, args, out: kept.update(map=out))
    model.stages[2].register_full_backward_hook(lambda m, into, out: kept.update(gradient=out[0]))
    model(image(64, 96))[0, 3].backward()
    assert kept["map"].shape == kept["gradient"].shape == (1, 384, 2, 3)
    assert kept["gradient"].abs().max() > 0


class Adapted(nn.Conv2d):
    """A convolution with an added term, as in LoRA."""

    def forward(self, x):
        return super().forward(x) + 1


@torch.no_grad()
@pytest.mark.parametrize("place", ["conv", "shortcut"])
def test_a_module_in_the_place_of_a_convolution_is_used_or_refused(place):
    for taps in TAPS:
        model = contnet.create_model("contnet_ti", taps=taps).eval()
        before, maps = model(image(64)), model.forward_features(image(64), ["res2", "res5"])
        block = model.stages[0][0]
        plain = getattr(block, place)
        adapted = Adapted(
            plain.in_channels, plain.out_channels, plain.kernel_size, 2, plain.padding, bias=False
        )
        adapted.load_state_dict(plain.state_dict())
        setattr(block, place, adapted)
        assert (model(image(64)) - before).abs().max() > 1e-4
        if taps == "stage":
            with pytest.raises(TypeError, match="Adapted"):
                model.forward_features(image(64), ["res2"])
            model.forward_features(image(64), ["res5"])
        else:
            found = model.forward_features(image(64), ["res2", "res5"])
            assert torch.equal(found["res2"], maps["res2"])
            assert (found["res5"] - maps["res5"]).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("use_avgdown", [False, True])
def test_dense_taps_take_parametrised_weights(use_avgdown):
    model = contnet.create_model("contnet_ti", use_avgdown=use_avgdown).eval()
    expected = model.forward_features(image(64), ["res2"])["res2"]
    conv = model.stages[0][0].conv
    nn.utils.parametrizations.weight_norm(conv)
    torch.testing.assert_close(model.forward_features(image(64), ["res2"])["res2"], expected)
    conv.parametrizations.weight.original0.mul_(2)
    found = model.forward_features(image(64), ["res2"])["res2"]
    assert (found - expected).abs().max() > 1e-3
