"""Parameters and multiply-adds of the built detectors, by the rule behind the published figures.

The rule: convolutions with their biases, linear layers without, norms 2 per element, ReLU and
max-pooling 1, with 1000 proposals through the box head, at 896x1344. Of parameters, those that are
trained, and the affine ones of norms whose block is trained. Nothing is computed: the detectors are
on the meta device, and hooks count from shapes.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from torch import nn

from contnet.config import load_config
from contnet.modeling.contnet import ConTBlock

CONFIGS = Path(__file__).parents[1] / "configs"


def _built(name, *opts):
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "meta", *opts])
    with torch.device("meta"):
        return cfg, build_model(cfg).eval()


def _operations(module, x, out):
    """Multiply-adds of one call of a module, without its children's, by kind."""
    if isinstance(module, nn.Conv2d):
        bias = 0 if module.bias is None else out.numel()
        yield "conv", out.numel() * module.weight[0].numel() + bias
    elif isinstance(module, nn.Linear):
        yield "linear", x.numel() * module.out_features
    elif isinstance(module, (FrozenBatchNorm2d, nn.LayerNorm)):
        yield "norm", 2 * out.numel()
    elif isinstance(module, nn.ReLU):
        yield "relu", out.numel()
    elif isinstance(module, nn.MaxPool2d):
        yield "pool", x.numel()
    elif isinstance(module, ConTBlock):
        # The block calls its convolution and its ReLU as functions.
        yield "relu", x.numel()
        yield "conv", out[0].numel() * module.conv.weight[0].numel()
    elif isinstance(module, BasicStem):
        # ReLU and pooling, both at twice the output's height and width.
        yield "relu", 4 * out.numel()
        yield "pool", 4 * out.numel()
    elif isinstance(module, BottleneckBlock):
        middle = out.numel() // 4
        yield "relu", middle * module.stride**2 + middle + out.numel()


def count_operations(name, *opts):
    """G multiply-adds by kind."""
    cfg, model = _built(name, *opts)
    total = Counter()

    def hook(module, args, out):
        for kind, number in _operations(module, args[0], out):
            total[kind] += number / 1e9

    for module in model.modules():
        module.register_forward_hook(hook)
    image = torch.empty(1, 3, 896, 1344, device="meta")
    with torch.no_grad():
        features = model.backbone(image)
        model.proposal_generator.rpn_head([features[k] for k in cfg.MODEL.RPN.IN_FEATURES])
        side = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        pooled = torch.empty(1000, features["p2"].shape[1], side, side, device="meta")
        model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    return total


def count_parameters(name):
    """Trained parameters in M, with the affine ones of frozen norms in trained blocks."""
    _, model = _built(name)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for module in model.modules():
        norm = getattr(module, "norm", None)
        if isinstance(norm, FrozenBatchNorm2d) and any(
            p.requires_grad for p in module.parameters()
        ):
            total += norm.weight.numel() + norm.bias.numel()
    return total / 1e6


@pytest.mark.parametrize(
    ("name", "parameters", "operations"),
    [
        ("faster_rcnn_r50", 41.53, 241.01),
        ("faster_rcnn_contti", 22.75, 165.04),
        ("faster_rcnn_conts", 26.83, 187.32),
        ("faster_rcnn_contm", 36.27, 225.64),
        ("faster_rcnn_contb", 52.77, 304.73),
    ],
)
def test_detectors_count_as_the_paper_counts(name, parameters, operations):
    assert count_parameters(name) == pytest.approx(parameters, abs=0.01)
    assert count_operations(name).total() == pytest.approx(operations, abs=0.01)


def test_taps_before_down_sampling_count_less():
    total = count_operations("faster_rcnn_contm", "MODEL.CONTNET.TAPS", "pre").total()
    assert total == pytest.approx(209.6, abs=0.05)
