"""Tests the network against the oracle at many sizes; its shapes, errors and counts."""

import math
from functools import partial

import pytest
import torch
from oracle import Encoder, make_oracle, make_pair
from pairs import (
    COMBINATIONS,
    FLAGS,
    NAMES,
    ODD_SIZES,
    OUTPUTS,
    PRE_CHANNELS,
    SINGLES,
    STAGE_CHANNELS,
    case_label,
    choices,
    difference,
    image,
    label,
    pair,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import contnet

# Figures of docs and paper: parameters (M), convolutions + linears (GMACs at
# 224x224), attention products (G).
COUNTS = {
    "contnet_ti": (5.889, 0.867, 0.133),
    "contnet_s": (10.103, 1.493, 0.177),
    "contnet_m": (19.537, 3.086, 0.354),
    "contnet_b": (36.043, 6.375, 0.654),
}


# --- agreement with the oracle -------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"), choices(COMBINATIONS, SINGLES, [{}, FLAGS]), ids=case_label
)
def test_logits_equal_the_oracle_at_224(name, options):
    theirs, ours = make_pair(name, **options)
    x = image(224)
    expected = theirs(x)
    # Single precision; rounding errors depend on the CPU.
    assert difference(ours(x), expected) < max(5e-5, 2e-6 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
@pytest.mark.parametrize(
    ("name", "options"), choices(SINGLES, [{}, FLAGS], [FLAGS]), ids=case_label
)
def test_logits_equal_the_oracle_at_other_sizes(name, options, size):
    theirs, ours = pair(name, options)
    x = image(*size)
    assert difference(ours(x), theirs(x)) < 5e-5


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (448, 224), (1, 1), (33, 449), (230, 219)], ids=str)
@pytest.mark.parametrize("options", [{}, FLAGS], ids=label)
def test_logits_equal_the_oracle_in_batches(options, size):
    theirs, ours = pair("contnet_ti", options)
    x = image(*size, batch=3)
    together = ours(x)
    assert difference(together, theirs(x)) < 5e-5
    alone = torch.cat([ours(one[None]) for one in x])
    assert difference(together, alone) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("taps", ["stage", "pre"])
@pytest.mark.parametrize(
    ("options", "size"),
    [(o, (37, 50)) for o in COMBINATIONS]
    + [(o, size) for o in ({}, FLAGS) for size in ((99, 131), (224, 224))],
    ids=case_label,
)
def test_taps_equal_the_oracle(options, size, taps):
    theirs, ours = make_pair("contnet_ti", ours={"taps": taps}, **options)
    x = image(*size)
    expected = theirs.features(x, taps)
    got = ours.forward_features(x, out_features=list(OUTPUTS))
    assert list(got) == list(OUTPUTS)
    for key in OUTPUTS:
        assert difference(got[key], expected[key]) < 5e-5, key
    assert difference(ours.forward_features(x), expected["res5"]) < 5e-5


@torch.no_grad()
@pytest.mark.parametrize("taps", ["stage", "pre"])
@pytest.mark.parametrize("name", NAMES)
def test_taps_of_every_variant_equal_the_oracle(name, taps):
    theirs, ours = make_pair(name, ours={"taps": taps})
    x = image(61, 300)
    expected = theirs.features(x, taps)
    got = ours.forward_features(x, out_features=list(OUTPUTS))
    for key in OUTPUTS:
        assert difference(got[key], expected[key]) < 5e-5, key


@torch.no_grad()
@pytest.mark.parametrize("options", SINGLES, ids=label)
def test_oracle_taps_agree_with_its_classifier(options):
    theirs = make_oracle("contnet_ti", **options)
    x = image(75, 90)
    last = theirs.features(x, "stage")["res5"]
    assert difference(theirs.fc(last.mean((2, 3))), theirs(x)) == 0
    block = theirs.layers()[0][-1]
    stem = theirs.stem(x)
    assert difference(block.dense(stem)[..., ::2, ::2], block(stem)) < 1e-5


@torch.no_grad()
def test_oracle_margin_patch_is_attention_on_real_tokens_alone():
    encoder = Encoder(8, 2, 16, 7, relative=True, pre_norm=False, qkv_bias=True)
    x = torch.randn(1, 8, 7, 10)
    assert difference(encoder(x)[..., :7], encoder(x[..., :7])) < 1e-6
    assert difference(encoder(x)[..., 7:], encoder(x[..., 7:])) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(
    "chosen", [["res3"], ["res5"], ["res2", "res5"], ["res4", "res3"]], ids=str
)
@pytest.mark.parametrize("taps", ["stage", "pre"])
def test_chosen_outputs_equal_those_of_all(chosen, taps):
    model = pair("contnet_ti", taps=taps)[1]
    x = image(70, 93)
    everything = model.forward_features(x, out_features=list(OUTPUTS))
    some = model.forward_features(x, out_features=chosen)
    assert sorted(some) == sorted(chosen)
    for key in chosen:
        assert difference(some[key], everything[key]) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"), choices([{}, FLAGS], [{}, FLAGS], [FLAGS]), ids=case_label
)
def test_all_paths_agree(name, options):
    model = pair(name, options)[1]
    x = image(101, 60)
    last = model.forward_features(x)
    dense = model.forward_features(x, out_features=list(OUTPUTS))
    assert difference(last, dense["res5"]) < 5e-6 * last.abs().max()
    assert difference(model.forward_head(last), model(x)) < 1e-6
    pooled = model.forward_head(last, pre_logits=True)
    assert difference(pooled, last.mean((2, 3))) < 1e-6


# --- shapes, errors, counts ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("taps", ["stage", "pre"])
@pytest.mark.parametrize(
    ("name", "size"),
    choices([(224, 224), *ODD_SIZES], [(37, 50), (99, 131)], [(37, 50), (99, 131)]),
    ids=case_label,
)
def test_declared_channels_and_strides(name, taps, size):
    model = pair(name, taps=taps)[1]
    channels = (STAGE_CHANNELS if taps == "stage" else PRE_CHANNELS)[name]
    assert model.out_feature_channels == dict(zip(OUTPUTS, channels, strict=True))
    assert model.out_feature_strides == dict(zip(OUTPUTS, (4, 8, 16, 32), strict=True))
    maps = model.forward_features(image(*size), out_features=list(OUTPUTS))
    for key in OUTPUTS:
        stride = model.out_feature_strides[key]
        expected = [math.ceil(s / stride) for s in size]
        assert list(maps[key].shape) == [1, model.out_feature_channels[key], *expected]
        assert maps[key].isfinite().all()


@pytest.mark.parametrize(
    "bad",
    [{"no_such_option": 1}, {"relativ": True}],
    ids=label,
)
def test_unknown_options_raise(bad):
    with pytest.raises(TypeError):
        contnet.create_model("contnet_ti", **bad)


def test_bad_values_raise():
    with pytest.raises(ValueError, match="taps"):
        contnet.create_model("contnet_ti", taps="post")
    with pytest.raises((ValueError, KeyError), match="contnet_xl"):
        contnet.create_model("contnet_xl")
    with pytest.raises((ValueError, KeyError), match="res6"):
        pair("contnet_ti")[1].forward_features(image(32), out_features=["res6"])


def test_other_inputs_and_classes():
    model = contnet.create_model("contnet_ti", num_classes=10, in_chans=4)
    assert model(torch.randn(2, 4, 64, 64)).shape == (2, 10)
    headless = contnet.create_model("contnet_ti", num_classes=0)
    assert headless(image(64)).shape == (1, 768)


def test_norm_layer_replaces_the_batch_norms():
    model = contnet.create_model("contnet_ti", norm_layer=partial(nn.GroupNorm, 16))
    kinds = [type(m) for m in model.modules()]
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(nn.GroupNorm) == 4
    assert model(image(64)).isfinite().all()


def test_fresh_weights_follow_the_published_initialisation():
    model = contnet.create_model("contnet_ti", relative=False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        elif isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
            assert module.eps == 1e-5
    names = position_tables({})
    assert len(names) == 16
    assert not any(model.get_parameter(name).any() for name in names)


def count_macs(call, *kinds):
    """Counts MACs (G) of a call, in operators whose names contain one of `kinds`."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if any(k in str(op) for k in kinds)) / 2e9


@pytest.mark.parametrize("name", NAMES)
def test_counts(name):
    model = pair(name)[1]
    x = image(224)
    parameters, dense, attention = COUNTS[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=6e-4)
    counted = count_macs(lambda: model(x), "convolution", "addmm", ".mm", "aten.mm")
    assert counted == pytest.approx(dense, abs=6e-4)
    assert count_macs(lambda: model(x), "bmm") == pytest.approx(attention, abs=6e-4)


@pytest.mark.parametrize("size", [(224, 224), (37, 50)], ids=str)
@pytest.mark.parametrize("options", [{}, {"use_avgdown": True}], ids=label)
def test_only_dense_taps_pay_for_stride_1(options, size):
    x = image(*size)
    model = pair("contnet_ti", options)[1]
    pre = pair("contnet_ti", options, taps="pre")[1]

    def convolutions(call):
        return count_macs(call, "convolution")

    classifier = convolutions(lambda: model(x))
    dense = convolutions(lambda: model.forward_features(x, out_features=list(OUTPUTS)))
    assert classifier < 0.8 * dense
    assert convolutions(lambda: model.forward_features(x)) == classifier
    assert convolutions(lambda: model.forward_features(x, out_features=["res5"])) == classifier
    assert convolutions(lambda: pre.forward_features(x, out_features=list(OUTPUTS))) == classifier


def test_nothing_is_paid_for_masks_when_sizes_fit():
    model = pair("contnet_ti")[1]
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=cpu) as profile:
        model(image(224))
    names = {event.key for event in profile.key_averages()}
    assert not {n for n in names if "constant_pad" in n or "masked_fill" in n or "where" in n}


# --- facts for optimisers ------------------------------------------------------------------------


def position_tables(options):
    """Returns our names of the position tables, found through the authors' names."""
    name = "contnet_ti"
    _, report = contnet.convert_state_dict(make_oracle(name, **options).state_dict())
    tables = ("pe.0", "pe.1", "relative_position_bias_table")
    return {ours for key, ours in report.mapped.items() if key.endswith(tables)}


@pytest.mark.parametrize("options", COMBINATIONS, ids=label)
def test_no_weight_decay_is_norms_biases_and_position_tables(options):
    model = contnet.create_model("contnet_ti", **options)
    expected = position_tables(options)
    assert len(expected) == (8 if options.get("relative") else 16)
    for name, module in model.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm | nn.BatchNorm2d) or key == "bias":
                expected.add(f"{name}.{key}")
    assert set(model.no_weight_decay()) == expected
