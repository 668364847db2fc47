"""Tests torch.compile, torch.jit.trace and torch.export of the network, without a compiler."""

import warnings

import pytest
import torch
from oracle import make_pair
from torch import nn
from torch.export import Dim
from torch.fx.experimental import _config as symbolic_config

from contnet.modeling.patches import merge_and_crop, pad_and_partition

OUTPUTS = ["res2", "res3", "res4", "res5"]
FLAGS = {"relative": True, "pre_norm": True, "use_avgdown": True, "qkv_bias": False}
OPTIONS = [{}, {"relative": True}, FLAGS]


def label(options):
    """Returns a readable test id."""
    return "-".join(options) or "default"


def network(options, name="contnet_ti", **ours):
    """Returns our network with random weights in evaluation mode."""
    return make_pair(name, ours=ours, **options)[1]


def image(height, width, batch=1):
    """Returns a fixed random input."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(2))


class Taps(nn.Module):
    """Returns the feature maps as the output of a module."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return tuple(self.model.forward_features(x, out_features=OUTPUTS).values())


def assert_equal(a, b, tolerance=1e-5):
    """Checks that two outputs, tensors or tuples, agree."""
    a, b = ((a,), (b,)) if isinstance(a, torch.Tensor) else (a, b)
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        assert (x - y).abs().max() < tolerance


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Resets the compiler, so that no test uses another test's graphs."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- torch.compile -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, FLAGS], ids=label)
def test_compiled_equals_eager(options):
    model = network(options)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for size in ((224, 224), (37, 50)):
        assert_equal(compiled(image(*size)), model(image(*size)))


@torch.no_grad()
@pytest.mark.long
def test_compiled_serves_changing_sizes():
    model = network({})
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for size in ((37, 50), (99, 131), (200, 99)):
        assert_equal(compiled(image(*size)), model(image(*size)))


def test_compiled_patches_serve_changing_sizes():
    def cut_and_join(x):
        return merge_and_crop(pad_and_partition(x, 14, 7, 1), 14, 7, 1, x)

    compiled = torch.compile(cut_and_join, backend="eager", fullgraph=True, dynamic=True)
    for height, width in ((28, 42), (9, 30), (28, 15)):
        x = image(height, width)
        assert torch.equal(compiled(x.permute(0, 2, 3, 1)), x.permute(0, 2, 3, 1))


@pytest.mark.parametrize("options", [{"relative": True}], ids=label)
def test_compiled_training_step_equals_eager(options):
    model = network(options)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = image(37, 50, batch=2)
    results = []
    for run in (model, compiled):
        model.zero_grad(set_to_none=True)
        run(x).square().mean().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for plain, other in zip(*results, strict=True):
        assert (plain - other).abs().max() <= 1e-5 * max(1, plain.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("taps", ["stage", "pre"])
def test_compiled_taps_equal_eager(taps):
    model = Taps(network({}, taps=taps))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_equal(compiled(image(61, 90)), model(image(61, 90)))


def test_compiled_with_activation_checkpointing():
    model = network({}, name="contnet_s")
    model.set_grad_checkpointing()
    compiled = torch.compile(model, backend="aot_eager")
    model.train()
    compiled(image(37, 50, batch=2)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- torch.jit.trace -----------------------------------------------------------------------------


def trace(model, x):
    """Traces the model; shapes become constants, as the ignored warnings say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.trace(model, x)


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (37, 50)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_traced_equals_eager(options, size):
    model = network(options)
    traced = trace(model, image(*size))
    other = image(*size).flip(-1)
    assert_equal(traced(other), model(other))


@torch.no_grad()
@pytest.mark.parametrize("taps", ["stage", "pre"])
@pytest.mark.parametrize("size", [(224, 224), (61, 90)], ids=str)
def test_traced_taps_equal_eager(size, taps):
    model = Taps(network(FLAGS, taps=taps))
    traced = trace(model, image(*size))
    other = image(*size).flip(-2)
    assert_equal(traced(other), model(other))


# --- torch.export --------------------------------------------------------------------------------


def export(model, x, shapes):
    """Returns the exported module for one input with the given dynamic axes."""
    return torch.export.export(model, (x,), dynamic_shapes=(shapes,)).module()


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "size", "wrap"),
    [
        ({}, (37, 50), nn.Sequential),
        (FLAGS, (37, 50), Taps),
        ({}, (224, 224), Taps),
        (FLAGS, (224, 224), nn.Sequential),
    ],
    ids=["default-odd-logits", "flags-odd-taps", "default-224-taps", "flags-224-logits"],
)
def test_export_with_dynamic_batch(options, size, wrap):
    model = wrap(network(options))
    exported = export(model, image(*size, batch=2), {0: Dim("batch", min=1, max=64)})
    for batch in (1, 2, 5):
        x = image(*size, batch=batch)
        assert_equal(exported(x), model(x))


def export_free(model, x, shapes, **settings):
    """Exports for free sizes; the setting prevents a special case for sizes of 1."""
    with symbolic_config.patch(backed_size_oblivious=True):
        program = torch.export.export(model, (x,), dynamic_shapes=(shapes,), **settings)
    return program.module()


free_sizes = pytest.mark.skipif(
    not hasattr(symbolic_config, "backed_size_oblivious"), reason="this PyTorch guards on sizes"
)


@torch.no_grad()
@pytest.mark.slow
def test_export_at_multiples_of_224_from_448():
    """Without the setting, PyTorch specialises dynamic sizes that may become 1, here one patch."""
    model = network({})
    rows, columns = Dim("rows", min=2, max=8), Dim("columns", min=2, max=8)
    exported = export(model, image(448, 672), {2: 224 * rows, 3: 224 * columns})
    assert_equal(exported(image(672, 448)), model(image(672, 448)))


@torch.no_grad()
@pytest.mark.slow
@free_sizes
@pytest.mark.parametrize(
    ("options", "wrap"), [({}, nn.Sequential), (FLAGS, Taps)], ids=["default-logits", "flags-taps"]
)
def test_export_at_multiples_of_224(options, wrap):
    model = wrap(network(options))
    rows, columns = Dim("rows", min=1, max=8), Dim("columns", min=1, max=8)
    exported = export_free(model, image(448, 672), {2: 224 * rows, 3: 224 * columns})
    for size in ((224, 224), (224, 448), (672, 224)):
        assert_equal(exported(image(*size)), model(image(*size)))


@torch.no_grad()
@pytest.mark.slow
@free_sizes
def test_export_with_free_height_and_width():
    """By default, export guards on properties of the example's size; this option defers that."""
    model = network({})
    shapes = {2: Dim("height", min=33, max=2048), 3: Dim("width", min=33, max=2048)}
    exported = export_free(
        model, image(330, 500), shapes, prefer_deferred_runtime_asserts_over_guards=True
    )
    for size in ((37, 50), (224, 224), (511, 333)):
        assert_equal(exported(image(*size)), model(image(*size)))


@torch.no_grad()
def test_exported_program_survives_saving(tmp_path):
    model = network({"relative": True})
    program = torch.export.export(
        model, (image(37, 50, batch=2),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},)
    )
    torch.export.save(program, tmp_path / "contnet.pt2")
    loaded = torch.export.load(tmp_path / "contnet.pt2").module()
    x = image(37, 50, batch=3)
    assert_equal(loaded(x), model(x))
