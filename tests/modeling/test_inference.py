"""Networks made ready for inference, against the networks that they were made from."""

import copy

import pytest
import torch
from conftest import REPOSITORY
from networks import difference, images, randomised

import contnet
from contnet.config import load_config
from contnet.modeling.build import build_model
from contnet.modeling.inference import optimize_for_inference

LEAF = REPOSITORY / "configs" / "faster_rcnn_contti.yaml"


def run(model, x):
    with torch.no_grad():
        return model(x)


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
    assert isinstance(fast, contnet.ConTNet)
    assert not fast.training
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not fast(images((64, 64))).requires_grad


def test_a_detector_finds_the_same():
    torch.manual_seed(0)
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    detector = build_model(load_config(str(LEAF), overrides)).eval()
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


def test_no_graphs_is_refused():
    with pytest.raises(ValueError, match="max_graphs is 0"):
        optimize_for_inference(randomised("contnet_ti"), max_graphs=0)
