"""Tests parameters and MACs of the built models against the published figures."""

import pytest
from conftest import REPOSITORY

from contnet.config import load_config
from contnet.modeling.macs import build_meta_model, count_macs, count_parameters

CONFIGS = REPOSITORY / "configs"
SIZE = (896, 1344)
ALL_TAPS = ["MODEL.CONTNET.OUT_FEATURES", "['res2','res3','res4','res5']"]


def _counted(name, *opts, size=SIZE):
    """Counts parameters in M, and MACs in G without and of attention products."""
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), opts)
    model = build_meta_model(cfg)
    macs = count_macs(cfg, model, size)
    attention = macs.pop("attention", 0)
    return count_parameters(model), macs.total(), attention


@pytest.mark.parametrize(
    ("name", "opts", "parameters", "macs"),
    [
        ("faster_rcnn_r50", [], 41.53, 241.01),
        ("faster_rcnn_contti", [], 22.75, 165.04),
        ("faster_rcnn_conts", [], 26.83, 187.32),
        ("faster_rcnn_contm", [], 36.27, 225.64),
        ("faster_rcnn_contb", [], 52.77, 304.73),
        # The published FCOS includes a tap that it does not use.
        ("fcos_contm", ALL_TAPS, 26.84, 228.44),
        ("fcos_plain_contm", ALL_TAPS, 26.84, 228.44),
    ],
)
def test_detectors_count_as_the_paper_counts(name, opts, parameters, macs):
    counted, total, _ = _counted(name, *opts)
    assert counted == pytest.approx(parameters, abs=0.01)
    assert total == pytest.approx(macs, abs=0.01)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("retinanet_r50", 37.74), ("retinanet_contm", 30.16), ("fcos_r50", 32.07)],
)
def test_parameters_of_the_other_detectors(name, parameters):
    assert _counted(name)[0] == pytest.approx(parameters, abs=0.01)


def test_taps_before_down_sampling_count_less():
    _, total, _ = _counted("faster_rcnn_contm", "MODEL.CONTNET.TAPS", "pre")
    assert total == pytest.approx(209.6, abs=0.05)


def test_attention_is_counted_apart():
    """0.354 G at 224x224; 896x1344 has 24 times as many patches."""
    _, _, attention = _counted("faster_rcnn_contm")
    assert attention == pytest.approx(24 * 0.354, rel=0.002)
    assert _counted("faster_rcnn_r50")[2] == 0


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("deit_tiny_patch16_224", [(12, 197, 192, 1)]),
        # Windows of 7x7, and timm's own attention class.
        (
            "swin_tiny_patch4_window7_224",
            [(2, 49, 96, 64), (2, 49, 192, 16), (6, 49, 384, 4), (2, 49, 768, 1)],
        ),
        ("beit_base_patch16_224", [(12, 197, 768, 1)]),
        ("resnet18", []),
    ],
)
def test_attention_of_any_classifier_is_counted(name, blocks):
    """Each block has two products of windows with this number of tokens and channels."""
    *_, attention = _counted("imagenet/res18", "MODEL.CLASSIFIER.NAME", name, size=(224, 224))
    expected = sum(n * 2 * tokens**2 * width * windows for n, tokens, width, windows in blocks)
    assert attention == pytest.approx(expected / 1e9, rel=1e-6)


def test_classifiers_count_as_published():
    parameters, macs, attention = _counted("imagenet/contm", size=(224, 224))
    assert (parameters, macs, attention) == pytest.approx((19.537, 3.086, 0.354), abs=0.001)
    assert _counted("imagenet/res50", size=(224, 224))[1] == pytest.approx(4.09, abs=0.005)


def test_masks_and_dilation_cost():
    faster, masks = _counted("faster_rcnn_r50"), _counted("mask_rcnn_r50")
    # Four 3x3 convolutions, an upsampling and 80 masks, on 100 regions of 14x14.
    convolutions = 4 * 100 * 14**2 * (256 * 256 * 9 + 256 + 256)
    upsampling = 100 * 14**2 * (256 * 256 * 4) + 100 * 28**2 * (256 + 256)
    classes = 100 * 28**2 * (256 * 80 + 80)
    assert masks[1] - faster[1] == pytest.approx(
        (convolutions + upsampling + classes) / 1e9, rel=0.01
    )
    coarse = ["MODEL.RESNETS.OUTPUT_STRIDE", "32"]
    size = (512, 1024)
    fine, plain = (_counted("cityscapes/pspnet_r50", *o, size=size) for o in ([], coarse))
    assert fine[0] == plain[0]
    assert fine[1] > 3 * plain[1]
