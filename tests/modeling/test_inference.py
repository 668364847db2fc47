"""Tests networks that are optimised for inference against the original networks."""

import copy

import pytest
import torch
from conftest import REPOSITORY
from networks import difference, images, randomised

from contnet.config import load_config
from contnet.modeling.backbone import backbone_prefix
from contnet.modeling.build import build_model
from contnet.modeling.inference import CudaGraphs, optimize_for_inference

LEAF = REPOSITORY / "configs" / "faster_rcnn_contti.yaml"


def run(model, x):
    with torch.no_grad():
        return model(x)


def reload(model):
    model.load_state_dict(model.state_dict())
    return model


@pytest.mark.parametrize("size", [(224, 224), (61, 90)], ids=str)
def test_same_numbers(size):
    model = randomised("contnet_ti").eval()
    x = images(size)
    assert difference(optimize_for_inference(model)(x), run(model, x)) == 0


@pytest.mark.parametrize("options", [{}, {"relative": True, "pre_norm": True}], ids="-".join)
def test_half_precision_gives_the_images_type(options):
    model = randomised("contnet_ti", **options).eval()
    x = images((61, 90))
    out = optimize_for_inference(model, torch.bfloat16)(x)
    assert out.dtype == torch.float32
    assert 0 < difference(out, run(model, x)) < 0.03


def test_running_statistics_keep_their_precision():
    model = randomised("contnet_ti")
    model.train()(images((64, 64)))
    fast = optimize_for_inference(model, torch.bfloat16)
    norm, own = fast.stages[1][0].norm, model.stages[1][0].norm
    assert norm.running_var.dtype == torch.float32
    assert torch.equal(norm.running_var, own.running_var)
    assert fast.stem.weight.dtype == torch.bfloat16


def test_the_model_stays_as_it_is():
    model = randomised("contnet_ti").train()
    before = copy.deepcopy(model.state_dict())
    fast = optimize_for_inference(model, torch.bfloat16)
    assert not fast.training
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not fast(images((64, 64))).requires_grad


@pytest.fixture
def detector():
    torch.manual_seed(0)
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    return build_model(load_config(str(LEAF), overrides)).eval()


def test_a_detector_finds_the_same(detector):
    batch = [{"image": torch.randint(0, 256, (3, 96, 130), dtype=torch.uint8)}]
    expected = run(detector, batch)[0]["instances"]
    detector.backbone = optimize_for_inference(detector.backbone)
    found = run(detector, batch)[0]["instances"]
    assert len(found) == len(expected) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_compiled():
    model = randomised("contnet_ti").eval()
    fast = optimize_for_inference(model, backend="aot_eager")
    x = images((61, 90))
    assert difference(fast(x), run(model, x)) < 1e-5


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="max_graph_bytes is -1"):
        optimize_for_inference(randomised("contnet_ti"), max_graph_bytes=-1)


# --- the module around the network ---------------------------------------------------------------


def test_a_backbone_keeps_its_attributes(detector):
    backbone = detector.backbone
    fast = optimize_for_inference(backbone)
    assert fast.output_shape() == backbone.output_shape()
    assert fast.size_divisibility == backbone.size_divisibility == 32
    assert fast.padding_constraints == backbone.padding_constraints
    assert fast.bottom_up.stages[0].grad_checkpointing is False
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing


def test_names_are_the_networks(detector):
    model = detector.backbone
    fast = optimize_for_inference(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert {n for n, _ in fast.named_modules()} == {n for n, _ in model.named_modules()}
    fast.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*: "fpn_lateral2.weight'):
        fast.load_state_dict({})


def test_a_detector_loads_into_it(detector):
    names = list(detector.state_dict())
    prefix = backbone_prefix(detector)
    state = {name: torch.ones_like(value) for name, value in detector.state_dict().items()}
    detector.backbone = optimize_for_inference(detector.backbone)
    assert list(detector.state_dict()) == names
    assert backbone_prefix(detector) == prefix
    detector.load_state_dict(state)
    assert all((value == 1).all() for value in detector.backbone.state_dict().values())


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_copy_has_weights_of_its_own(backend):
    x = images((4, 6))
    fast = optimize_for_inference(torch.nn.Conv2d(3, 2, 1), backend=backend)
    before = fast(x)
    other = copy.deepcopy(fast)
    assert torch.equal(other(x), before)
    other.weight.zero_()
    other.bias.zero_()
    assert not other(x).any()
    assert torch.equal(fast(x), before)


@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16], ids=str)
def test_cast(start):
    model = randomised("contnet_ti").eval()
    x = images((37, 50))
    fast = optimize_for_inference(model, start).to(torch.float64)
    assert {value.dtype for value in fast.parameters()} == {torch.float64}
    assert fast(x).dtype == torch.float32
    assert difference(fast(x), run(model, x)) < (1e-5 if start is torch.float32 else 0.03)


# --- which images are recorded, which needs no GPU -----------------------------------------------


class Recordings(CudaGraphs):
    """Records the sizes of the images that it should record; each uses 100 bytes."""

    def __init__(self, max_bytes=1000):
        super().__init__(torch.nn.Flatten(), max_bytes)
        self.sizes = []

    def record(self, images):
        self.sizes.append(images.shape[2])
        return (lambda images: "replayed"), 100


def test_the_second_sight_is_recorded():
    graphs = Recordings()
    a, b = images((2, 3)), images((4, 3))
    assert torch.equal(graphs(a), a.flatten(1))
    graphs(b)
    assert graphs.sizes == []
    assert graphs(a) == graphs(a) == graphs(b) == "replayed"
    assert graphs.sizes == [2, 4]


def test_past_the_budget_nothing_is_recorded(caplog):
    graphs = Recordings(max_bytes=150)
    for size in (2, 3, 4, 5) * 3:
        graphs(images((size, 3)))
    assert graphs.sizes == [2, 3]
    assert graphs(images((2, 3))) == "replayed"
    assert len(caplog.messages) == 1
    assert "for 2 kinds of images" in caplog.text


def test_no_budget_records_nothing(caplog):
    graphs = Recordings(max_bytes=0)
    for _ in range(3):
        graphs(images((2, 3)))
    assert graphs.sizes == []
    assert not caplog.messages


def test_what_is_computed_differently_is_recorded_apart():
    graphs = Recordings()
    x = images((2, 3))
    for _ in range(2):
        graphs(x)
        graphs(x.double())
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                graphs(x)
    assert len(graphs.sizes) == 4


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda module: module.double(),
        reload,
        lambda module: torch.nn.Sequential(module).float()[0],
        lambda module: reload(torch.nn.Sequential(module))[0],
    ],
    ids=["copied", "cast", "loaded", "cast in a model", "loaded in a model"],
)
def test_other_weights_forget_what_was_recorded(change, monkeypatch):
    monkeypatch.setattr(CudaGraphs, "record", lambda self, images: (lambda images: "replayed", 1))
    fast = optimize_for_inference(torch.nn.Flatten())
    x = images((2, 3))
    fast._graphs(x)
    assert fast._graphs(x) == "replayed"
    assert torch.equal(change(fast)._graphs(x), x.flatten(1))
