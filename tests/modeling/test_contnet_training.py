"""Tests the network as a PyTorch module: gradients, dropout, recomputation, precision, state."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import make_pair
from pairs import (
    COMBINATIONS,
    FLAGS,
    NAMES,
    OUTPUTS,
    case_label,
    choices,
    difference,
    gradients,
    image,
    label,
    pair,
    randomised,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import contnet
from contnet.modeling.encoder import Mlp

# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("taps", ["stage", "pre"])
@pytest.mark.parametrize(
    ("name", "size"),
    choices([(37, 50), (200, 20), (1, 1)], [(37, 50), (1, 1)], [(37, 50)]),
    ids=case_label,
)
def test_patches_of_padding_only_give_no_nan(name, size, taps):
    """At 37x50, stage 2 is 5x7: of four 7x7 patches in a 14x14 frame, three are only padding."""
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
        # A key's bias shifts all scores equally: its true gradient is zero, so only noise is left.
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
    """Returns whether two passes differ."""
    with torch.no_grad():
        return difference(model(x), model(x)) > 1e-6


def frozen_norms(model):
    """Sets training mode, but batch norms use their running statistics."""
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
    """If everything there is dropped, the encoders have no attention and MLP."""
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
    ("name", "part"),
    [("contnet_ti", "block"), ("contnet_b", "block"), ("contnet_b", "mlp"), ("contnet_b", "gelu")],
)
def test_checkpointing_changes_nothing(name, part):
    """B has dropout, so the random state must be restored for the recomputation."""
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
    """Returns the bytes that autograd keeps for the backward pass."""
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
    for part in ("", "gelu", "mlp", "block"):
        model.set_grad_checkpointing(part)
        kept[part] = saved_bytes(model, x)
    assert kept["gelu"] < 0.85 * kept[""]
    assert kept["mlp"] < 0.85 * kept["gelu"]
    assert kept["block"] < 0.5 * kept["mlp"]


def test_gradients_of_gradients_with_gelus_computed_again():
    mlp = Mlp(4, 6, drop=0.0).double().train()
    mlp.grad_checkpointing = True
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mlp, x) and torch.autograd.gradgradcheck(mlp, x)


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
    """Returns everything that modules hold, with tensors by identity and version."""

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
    """A tensor that is cached in inference mode could not be saved for a later backward pass."""
    model = contnet.create_model("contnet_ti", num_classes=3, relative=True)
    with torch.inference_mode():
        model.eval()(image(37, 50))
    model.train()(image(37, 50, batch=2)).sum().backward()


# --- masks of margins ----------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Records the names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_masks_of_a_size_are_made_once():
    model = contnet.create_model("contnet_ti", num_classes=3).eval()
    made = []
    for _ in range(2):
        with torch.no_grad(), Calls() as calls:
            model(image(83, 61))
        made.append(calls.names.count("arange"))
    assert made[0] and not made[1]


def test_masks_that_inference_has_made_serve_a_training():
    model = contnet.create_model("contnet_ti", num_classes=3)
    with torch.inference_mode():
        model.eval()(image(59, 87))
    gradients(model.train(), image(59, 87))
    with ThreadPoolExecutor(4) as pool:
        outputs = [*pool.map(model.eval(), [image(91, 67)] * 8)]
    assert all(torch.equal(each, outputs[0]) for each in outputs)
