"""Tests half precision: operations that must stay in float32, and those that must not."""

from copy import deepcopy

import pytest
import torch
from detectron2.structures import Boxes
from leaves import CONFIGS, TINY
from networks import images, randomised

from contnet.config import load_config
from contnet.modeling.build import build_model
from contnet.modeling.encoder import Encoder

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def mask_rcnn():
    """Builds an untrained Mask R-CNN."""
    return build_model(load_config(str(CONFIGS / "mask_rcnn_contti.yaml"), TINY))


def small_boxes(count: int) -> Boxes:
    """Draws boxes of 8 to 64 pixels within 1333 x 800."""
    corner = torch.rand(count, 2) * torch.tensor([1260.0, 730.0])
    size = 8 + 56 * torch.rand(count, 2)
    return Boxes(torch.cat([corner, corner + size], dim=1))


def logits_and_gradients(model, x):
    """Returns logits in evaluation and all gradients in training, each as one float64 vector."""
    with torch.no_grad():
        logits = model.eval()(x)
    model.train().zero_grad()
    model(x).double().logsumexp(1).sum().backward()
    gradients = torch.cat([each.grad.double().flatten() for each in model.parameters()])
    return logits.double(), gradients


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("pooler", ["box_pooler", "mask_pooler"])
def test_regions_are_pooled_where_they_are(mask_rcnn, pooler, dtype):
    """The features of a region equal float32's, except for the last rounding."""
    pooler = getattr(mask_rcnn.roi_heads, pooler)
    maps = [torch.randn(1, 16, 800 // s, 1336 // s).to(dtype) for s in (4, 8, 16, 32)]
    boxes = [small_boxes(200)]
    want = pooler([each.float() for each in maps], boxes)
    with torch.autocast("cpu", dtype):
        have = pooler(maps, boxes)
    assert have.dtype == dtype
    assert (have.float() - want).norm() < 0.002 * want.norm()


@pytest.mark.parametrize("dtype", HALF)
def test_masks_are_pasted_in_float32(mask_rcnn, dtype):
    """Mask probabilities are float32, which determines the type that pasting uses."""
    with torch.autocast("cpu", dtype):
        logits = mask_rcnn.roi_heads.mask_head.layers(torch.randn(2, 16, 14, 14).to(dtype))
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"relative": True, "pre_norm": True}], ids="-".join)
def test_residual_sums_stay_in_half_precision(options):
    """Logits are nevertheless within 1.5 % of float64's, and gradients within 10 %."""
    model, x = randomised("contnet_s", **options), images((224, 224))
    exact, types = logits_and_gradients(deepcopy(model).double(), x.double()), set()
    for module in model.modules():
        if isinstance(module, Encoder):
            module.register_forward_hook(lambda *call: types.add(call[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        half = logits_and_gradients(model, x)
    assert types == {torch.bfloat16}
    for have, want, bound in zip(half, exact, (0.015, 0.1), strict=True):
        assert (have - want).norm() < bound * want.norm()
