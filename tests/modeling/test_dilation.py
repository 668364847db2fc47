"""Tests output strides below 32: the same weights and function on a finer grid."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_resnet_backbone

from contnet.config import add_contnet_config
from contnet.modeling.contnet import FEATURES, TAPS, create_model

OPTIONS = [
    {},
    {"relative": True},
    {"pre_norm": True},
    {"use_avgdown": True},
    {"relative": True, "pre_norm": True, "use_avgdown": True, "qkv_bias": False},
]
SIZES = [(224, 224), (131, 77), (20, 33)]


def _pair(variant="contnet_ti", *, output_stride, seed=0, **options):
    """Returns the undilated network and a dilated one with its weights, in double precision."""
    torch.manual_seed(seed)
    plain = create_model(
        variant, num_classes=0, **{k: v for k, v in options.items() if k[:3] != "dil"}
    )
    for parameter in plain.parameters():
        # Position tables start at zero, where wrong positions would not be detected.
        if parameter.std() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    dilated = create_model(variant, num_classes=0, output_stride=output_stride, **options)
    dilated.load_state_dict(plain.state_dict())
    return plain.double().eval(), dilated.double().eval()


def _image(height, width, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def _difference(a, b):
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_patches_keep_the_function(output_stride, options, size):
    plain, dilated = _pair(output_stride=output_stride, **options)
    x = _image(*size)
    with torch.no_grad():
        coarse, fine = plain.forward_features(x, FEATURES), dilated.forward_features(x, FEATURES)
    for name in FEATURES:
        stride = dilated.out_feature_strides[name]
        step = plain.out_feature_strides[name] // stride
        assert fine[name].shape[-2:] == tuple(math.ceil(side / stride) for side in size)
        assert _difference(fine[name][..., ::step, ::step], coarse[name]) < 1e-12


def test_deeper_variants_keep_the_function_too():
    plain, dilated = _pair("contnet_m", output_stride=8)
    x = _image(224, 224, batch=1)
    with torch.no_grad():
        coarse, fine = plain.forward_features(x, FEATURES), dilated.forward_features(x, FEATURES)
    assert _difference(fine["res4"][..., ::2, ::2], coarse["res4"]) < 1e-12
    assert _difference(fine["res5"][..., ::4, ::4], coarse["res5"]) < 1e-12


def test_every_grid_of_a_dilated_block_is_a_plain_map():
    plain, dilated = _pair(output_stride=8)
    x = _image(448, 448, batch=1)
    with torch.no_grad():
        x = dilated.forward_features(x, ["res4"])["res4"]
        fine = dilated.stages[3][0](x)
        for row, column in [(0, 3), (1, 0), (2, 1), (3, 3)]:
            own = plain.stages[3][0](x[..., row::4, column::4])
            assert _difference(fine[..., row::4, column::4], own) < 1e-12


@pytest.mark.parametrize("output_stride", [8, 16])
def test_adjacent_patches_are_cut_as_without_dilation(output_stride):
    plain, dilated = _pair(output_stride=output_stride, dilated_patches=False)
    for (ours, theirs), channels in zip(
        zip((b[0] for b in dilated.stages), (b[0] for b in plain.stages), strict=True),
        (48, 96, 192, 384),
        strict=True,
    ):
        x = torch.randn(1, channels, 30, 17, dtype=torch.float64)
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
    x = _image(96, 96)
    with torch.no_grad():
        fine = dilated.forward_features(x, ["res5"])["res5"]
        coarse = plain.forward_features(x, ["res5"])["res5"]
    step = 32 // output_stride
    assert fine.isfinite().all()
    assert _difference(fine[..., ::step, ::step], coarse) > 1e-3


@pytest.mark.parametrize("dilated_patches", [True, False])
@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_every_parameter_gets_a_gradient(output_stride, taps, dilated_patches):
    model = create_model(
        "contnet_ti",
        num_classes=0,
        taps=taps,
        output_stride=output_stride,
        dilated_patches=dilated_patches,
    )
    features = model.forward_features(torch.randn(2, 3, 37, 50), FEATURES)
    for name, feature in features.items():
        assert feature.shape[1] == model.out_feature_channels[name]
        assert feature.shape[-1] == math.ceil(50 / model.out_feature_strides[name])
    sum(feature.square().mean() for feature in features.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_wrong_output_stride_is_refused():
    with pytest.raises(ValueError, match="output_stride is 4"):
        create_model("contnet_ti", output_stride=4)


def _cfg(*opts):
    cfg = get_cfg()
    add_contnet_config(cfg)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", 0, *opts])
    return cfg


@pytest.mark.parametrize("taps", TAPS)
def test_backbone_reports_its_strides(taps):
    cfg = _cfg(
        *("MODEL.BACKBONE.NAME", "build_contnet_backbone", "MODEL.CONTNET.VARIANT", "contnet_ti"),
        *("MODEL.CONTNET.TAPS", taps, "MODEL.CONTNET.OUTPUT_STRIDE", 8),
    )
    shapes = build_backbone(cfg).output_shape()
    assert [shape.stride for shape in shapes.values()] == [4, 8, 8, 8]


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_resnet_keeps_its_function(output_stride, depth):
    features = list(FEATURES)
    cfg = _cfg(
        *("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.OUT_FEATURES", features),
        *("MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.RESNETS.NORM", "BN"),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64 if depth == 18 else 256),
    )
    plain = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    cfg.MODEL.BACKBONE.NAME = "build_dilated_resnet_backbone"
    cfg.MODEL.RESNETS.OUTPUT_STRIDE = output_stride
    dilated = build_backbone(cfg)
    dilated.load_state_dict(plain.state_dict())
    plain, dilated = plain.double().eval(), dilated.double().eval()
    x = _image(97, 130, batch=1)
    with torch.no_grad():
        coarse, fine = plain(x), dilated(x)
    for name, shape in dilated.output_shape().items():
        step = plain.output_shape()[name].stride // shape.stride
        assert fine[name].shape[2] == math.ceil(97 / shape.stride)
        assert fine[name].shape[1] == shape.channels
        assert _difference(fine[name][..., ::step, ::step], coarse[name]) < 1e-12
