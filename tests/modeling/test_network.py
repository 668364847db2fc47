"""The network against the oracle, at every size, and its behaviour as a PyTorch module."""

import itertools
import math
from functools import lru_cache, partial

import pytest
import torch
from oracle import VARIANTS, Encoder, make_oracle, make_pair
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import contnet

NAMES = sorted(VARIANTS)
OUTPUTS = ("res2", "res3", "res4", "res5")
FLAGS = {"relative": True, "pre_norm": True, "use_avgdown": True, "qkv_bias": False}
COMBINATIONS = [
    dict(chosen)
    for n in range(len(FLAGS) + 1)
    for chosen in itertools.combinations(FLAGS.items(), n)
]
SINGLES = [{}] + [{flag: value} for flag, value in FLAGS.items()] + [FLAGS]
ODD_SIZES = [(37, 50), (256, 256), (511, 333)]
STAGE_CHANNELS = {
    "contnet_ti": (96, 192, 384, 768),
    "contnet_s": (128, 256, 512, 1024),
    "contnet_m": (128, 256, 512, 1024),
    "contnet_b": (128, 256, 512, 1024),
}
PRE_CHANNELS = {
    "contnet_ti": (48, 96, 192, 768),
    "contnet_s": (64, 128, 256, 1024),
    "contnet_m": (64, 128, 256, 1024),
    "contnet_b": (64, 128, 256, 1024),
}
# Counted figures of docs and paper: parameters (M), convolutions + linears (GMACs at
# 224x224), attention products (G).
COUNTS = {
    "contnet_ti": (5.889, 0.867, 0.133),
    "contnet_s": (10.103, 1.493, 0.177),
    "contnet_m": (19.537, 3.086, 0.354),
    "contnet_b": (36.043, 6.375, 0.654),
}


def label(options):
    """A readable test id."""
    return "-".join(options) or "default"


def choices(for_ti, for_s, for_m_and_b):
    """Pairs of a variant and something: many for the smallest network, few for the largest."""
    chosen = {"contnet_ti": for_ti, "contnet_s": for_s}
    return [(name, one) for name in NAMES for one in chosen.get(name, for_m_and_b)]


def case_label(value):
    """A readable test id of a name, a tuple or options."""
    return label(value) if isinstance(value, dict) else str(value)


@lru_cache(maxsize=4)
def _cached_pair(name, ours, options):
    return make_pair(name, ours=ours, **dict(options))


def pair(name, options=None, **ours):
    """Cached oracle and converted network; tests must not change them."""
    options = options or {}
    return _cached_pair(name, tuple(ours.items()), tuple(options.items()))


def image(height, width=None, batch=1, dtype=torch.float32, seed=1):
    """A fixed random input."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width or height, generator=generator, dtype=dtype)


def difference(a, b):
    """Largest absolute difference of two tensors of the same shape."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def randomised(name, **options):
    """Our network alone, with the oracle's random weights."""
    oracle_options = {k: v for k, v in options.items() if k in FLAGS or k == "num_classes"}
    ours = {k: v for k, v in options.items() if k not in oracle_options}
    return make_pair(name, ours=ours, **oracle_options)[1]


def gradients(model, x, seed=0):
    """Gradients by name of a loss that weighs every logit differently."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


# --- agreement with the oracle -------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"), choices(COMBINATIONS, SINGLES, [{}, FLAGS]), ids=case_label
)
def test_logits_equal_the_oracle_at_224(name, options):
    theirs, ours = make_pair(name, **options)
    x = image(224)
    assert difference(ours(x), theirs(x)) < 5e-5


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
    """MACs (G) of a call, in operators whose names contain one of `kinds`."""
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


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("taps", ["stage", "pre"])
@pytest.mark.parametrize(
    ("name", "size"),
    choices([(37, 50), (200, 20), (1, 1)], [(37, 50), (1, 1)], [(37, 50)]),
    ids=case_label,
)
def test_patches_of_padding_only_give_no_nan(name, size, taps):
    """At 37x50 stage 2 is 5x7: of four 7x7 patches in a 14x14 frame, three are all padding."""
    model = contnet.create_model(name, num_classes=0, taps=taps).train()
    x = image(*size, batch=2).requires_grad_()
    maps = model.forward_features(x, out_features=list(OUTPUTS))
    assert all(m.isfinite().all() for m in maps.values())
    sum(m.square().mean() for m in maps.values()).backward()
    assert x.grad.isfinite().all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("options", COMBINATIONS, ids=label)
def test_every_parameter_gets_a_gradient_in_training(options):
    model = contnet.create_model("contnet_ti", num_classes=7, **options).train()
    model(image(90, 61, batch=2)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (37, 50)),
        ({"relative": True}, (37, 50)),
        (FLAGS, (37, 50)),
        (FLAGS, (224, 224)),
    ],
    ids=case_label,
)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_gradients_equal_the_oracle(options, size, train):
    theirs, ours = make_pair("contnet_ti", num_classes=10, **options)
    theirs, ours = theirs.double().train(train), ours.double().train(train)
    x = image(*size, batch=2, dtype=torch.float64)
    expected = theirs.state_dict()
    expected.update(gradients(theirs, x))
    converted, _ = contnet.convert_state_dict(expected)
    for key, gradient in gradients(ours, x).items():
        scale = converted[key].abs().max().item()
        assert scale > 0, key
        # A key's bias shifts all scores alike: its true gradient is zero, so noise decides.
        assert difference(gradient, converted[key]) < 1e-8 * max(scale, 1e-3), key


@pytest.mark.parametrize("taps", ["stage", "pre"])
@pytest.mark.parametrize("options", [{}, FLAGS], ids=label)
def test_tap_gradients_equal_the_oracle(options, taps):
    theirs, ours = make_pair("contnet_ti", ours={"taps": taps}, **options)
    theirs, ours = theirs.double(), ours.double()
    inputs = [image(75, 50, dtype=torch.float64).requires_grad_() for _ in range(2)]
    maps = (
        theirs.features(inputs[0], taps),
        ours.forward_features(inputs[1], out_features=OUTPUTS),
    )
    for each in maps:
        sum((m.sin() * m).sum() for m in each.values()).backward()
    scale = inputs[0].grad.abs().max().item()
    assert difference(inputs[0].grad, inputs[1].grad) < 1e-9 * scale


# --- dropout and training mode -------------------------------------------------------------------


def varies(model, x):
    """Whether two passes differ."""
    with torch.no_grad():
        return difference(model(x), model(x)) > 1e-6


def frozen_norms(model):
    """Training mode, but with batch norms on their running statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_only_b_drops_out_by_default(name):
    model = contnet.create_model(name)
    x = image(64)
    assert varies(frozen_norms(model), x) == (name == "contnet_b")
    assert not varies(model.eval(), x)


@pytest.mark.parametrize("rate", ["drop_rate", "last_drop_rate", "drop_path_rate"])
def test_each_rate_drops_in_training_only(rate):
    model = randomised("contnet_s", **{rate: 0.5})
    x = image(64, batch=4)
    assert not varies(model, x)
    with torch.no_grad():
        assert difference(model(x), randomised("contnet_s")(x)) == 0
    assert varies(frozen_norms(model), x)


def test_b_without_its_dropouts_is_deterministic():
    model = contnet.create_model("contnet_b", drop_rate=0.0, last_drop_rate=0.0)
    assert not varies(frozen_norms(model), image(64))


@torch.no_grad()
@pytest.mark.parametrize("name", ["contnet_ti", "contnet_b"])
def test_drop_rate_reaches_stages_3_and_4_only(name):
    """Dropping everything there leaves the encoders without attention and MLP."""
    theirs, ours = make_pair(name, ours={"drop_rate": 1.0, "last_drop_rate": 0.0})
    for layer in (theirs.layer3, theirs.layer4):
        for block in layer.values():
            for encoder in (block.ste1, block.ste2):
                for linear in (encoder.attn.proj, encoder.mlp.fc2):
                    linear.weight.zero_()
                    linear.bias.zero_()
    x = image(70, 90)
    assert difference(frozen_norms(ours)(x), theirs(x)) < 5e-5


@torch.no_grad()
def test_last_drop_rate_drops_the_last_residual_sum():
    theirs, ours = make_pair("contnet_ti", ours={"last_drop_rate": 1.0})
    x = image(64, batch=2)
    frozen_norms(ours)
    assert not ours.forward_features(x).any()
    half = make_pair("contnet_ti", ours={"last_drop_rate": 0.25})[1]
    got, kept = frozen_norms(half).forward_features(x), theirs.features(x)["res5"]
    zero = got == 0
    assert 0.15 < zero.float().mean() < 0.35
    assert difference(got[~zero], kept[~zero] / 0.75) < 1e-4


def test_batch_norm_statistics_move_in_training_only():
    model = contnet.create_model("contnet_ti")
    before = {k: v.clone() for k, v in model.named_buffers()}
    model.eval()(image(64))
    assert all(torch.equal(before[k], v) for k, v in model.named_buffers())
    model.train()(image(64, batch=2))
    moved = [k for k, v in model.named_buffers() if not torch.equal(before[k], v)]
    assert len([k for k in moved if k.endswith("running_mean")]) == 4


# --- activation checkpointing --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"), [("contnet_ti", "block"), ("contnet_b", "block"), ("contnet_b", "mlp")]
)
def test_checkpointing_changes_nothing(name, part):
    """B has dropout, so this also needs the random state to be restored on recomputation."""
    model = randomised(name, num_classes=10, drop_path_rate=0.2).train()
    x = image(70, 45, batch=2)
    results = []
    for enable in (False, part):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        model.set_grad_checkpointing(enable)
        results.append((gradients(model, x), {k: v.clone() for k, v in model.named_buffers()}))
        model.load_state_dict(state)
    (plain, plain_buffers), (saved, _) = results
    for key, gradient in plain.items():
        assert difference(gradient, saved[key]) <= 1e-6 * max(1, gradient.abs().max()), key
    assert all(b.isfinite().all() for b in plain_buffers.values())


@pytest.mark.parametrize("taps", ["stage", "pre"])
def test_checkpointed_taps_are_equal(taps):
    model = randomised("contnet_b", taps=taps).train()
    x = image(40, 70, batch=2)
    maps = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        maps.append(model.forward_features(x, out_features=list(OUTPUTS)))
    for key in OUTPUTS:
        assert maps[1][key].requires_grad
        assert difference(maps[0][key], maps[1][key]) == 0


def saved_bytes(model, x):
    """Bytes that autograd keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    assert out.requires_grad
    return sum(kept.values())


def test_checkpointing_saves_memory():
    model = contnet.create_model("contnet_m", num_classes=10).train()
    x = image(112)
    kept = {}
    for part in ("", "mlp", "block"):
        model.set_grad_checkpointing(part)
        kept[part] = saved_bytes(model, x)
    assert kept["mlp"] < 0.8 * kept[""]
    assert kept["block"] < 0.5 * kept["mlp"]


def test_checkpointing_of_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="enable is 'stage'"):
        contnet.create_model("contnet_ti").set_grad_checkpointing("stage")


# --- precision and memory formats ----------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "size"),
    [({}, (224, 224)), ({}, (37, 50)), ({"relative": True}, (37, 50)), (FLAGS, (37, 50))],
    ids=case_label,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_close(dtype, options, size):
    model = pair("contnet_ti", options)[1]
    x = image(*size)
    exact = model(x)
    with torch.autocast("cpu", dtype):
        out = model(x)
    assert out.isfinite().all()
    error = (out.float() - exact).std() / exact.std()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.008)


@pytest.mark.parametrize("options", [{}, FLAGS], ids=label)
def test_training_under_bf16_autocast(options):
    model = contnet.create_model("contnet_b", num_classes=10, **options).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(image(37, 50, batch=2)).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (37, 50), (200, 99)], ids=str)
@pytest.mark.parametrize("options", [{}, FLAGS], ids=label)
def test_channels_last_is_equal(options, size):
    model = randomised("contnet_ti", **options)
    x = image(*size, batch=2)
    expected = model(x)
    last = x.to(memory_format=torch.channels_last)
    assert difference(model(last), expected) < 2e-5
    model = model.to(memory_format=torch.channels_last)
    assert difference(model(last), expected) < 2e-5
    maps = model.forward_features(last, out_features=["res4"])
    assert maps["res4"].is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_half_and_double_modules_run():
    x = image(37, 50)
    for options in ({}, FLAGS):
        exact = pair("contnet_ti", options)[1](x)
        model = randomised("contnet_ti", **options)
        assert difference(model.double()(x.double()).float(), exact) < 5e-5
        low = model.bfloat16()(x.bfloat16())
        assert low.dtype == torch.bfloat16
        assert low.isfinite().all()


# --- no state ------------------------------------------------------------------------------------


def snapshot(model):
    """Everything that modules hold, with tensors by identity and version."""

    def freeze(value):
        if isinstance(value, torch.Tensor):
            return id(value), value._version
        if isinstance(value, dict):
            return {k: freeze(v) for k, v in value.items()}
        return repr(value) if not isinstance(value, nn.Module) else id(value)

    return {name: freeze(module.__dict__) for name, module in model.named_modules()}


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, FLAGS], ids=label)
def test_forward_leaves_no_state(options):
    model = randomised("contnet_ti", **options)
    before = snapshot(model)
    first = model(image(37, 50))
    assert snapshot(model) == before
    model(image(224))
    model.forward_features(image(100, 61), out_features=list(OUTPUTS))
    assert snapshot(model) == before
    assert torch.equal(model(image(37, 50)), first)
    fresh = randomised("contnet_ti", **options)
    assert torch.equal(fresh(image(37, 50)), first)


def test_inference_mode_does_not_poison_training():
    """A tensor cached inside inference mode could not be saved for backward later."""
    model = contnet.create_model("contnet_ti", num_classes=3, relative=True)
    with torch.inference_mode():
        model.eval()(image(37, 50))
    model.train()(image(37, 50, batch=2)).sum().backward()


# --- facts for optimisers and timm ---------------------------------------------------------------


def position_tables(options):
    """Our names of the position tables, found through the authors' names."""
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


def our_groups(model, coarse):
    """Layer number of every parameter, as timm reads the model's matcher."""
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
