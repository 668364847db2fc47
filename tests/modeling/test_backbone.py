"""Tests the Detectron2 backbones: every variant, tap and pyramid, norms, freezing, key prefixes."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm, ShapeSpec
from detectron2.modeling import Backbone, build_backbone
from detectron2.structures import ImageList
from torch import nn

from contnet.config import add_contnet_config
from contnet.modeling.backbone import NORMS, ConTNetBackbone, backbone_prefix
from contnet.modeling.build import build_model
from contnet.modeling.contnet import FEATURES, TAPS, VARIANTS, ConTNet, create_model
from contnet.modeling.fpn import DivisibleFPN, requires_res5

PYRAMIDS = {
    "build_contnet_fpn_backbone": ["p2", "p3", "p4", "p5", "p6"],
    "build_retinanet_contnet_fpn_backbone": ["p3", "p4", "p5", "p6", "p7"],
    "build_fcos_contnet_fpn_backbone": ["p3", "p4", "p5", "p6", "p7"],
    "build_fcos_resnet_fpn_backbone": ["p3", "p4", "p5", "p6", "p7"],
}

PYRAMID_CASES = [
    (name, ("MODEL.CONTNET.VARIANT", variant, "MODEL.CONTNET.TAPS", taps))
    for name in PYRAMIDS
    if "contnet" in name
    for variant in ("contnet_ti", "contnet_s")  # other widths; the rest without FPN
    for taps in TAPS
]
PYRAMID_CASES.append(("build_fcos_resnet_fpn_backbone", ()))


def _cfg(*opts):
    cfg = get_cfg()
    add_contnet_config(cfg)
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_contnet_backbone", *opts])
    return cfg


def _pyramid_cfg(name, *opts):
    features = list(FEATURES) if PYRAMIDS[name][0] == "p2" else list(FEATURES[1:])
    given = [f"MODEL.{part}.OUT_FEATURES" for part in ("CONTNET", "RESNETS")]
    opts = [
        *(item for key in given for item in (key, features)),
        *("MODEL.FPN.IN_FEATURES", features),
        *("MODEL.FPN.OUT_CHANNELS", 16),
        *("MODEL.BACKBONE.NAME", name),
        *opts,
    ]
    return _cfg(*opts)


def _backward(features):
    sum(feature.square().mean() for feature in features.values()).backward()


def _without_gradient(model):
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]


def _blocks(model):
    return [block for stage in model.stages for block in stage]


@pytest.mark.parametrize("size", [(37, 50), (65, 33)])
@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bare_backbone_keeps_what_it_reports_at_odd_sizes(variant, taps, size):
    cfg = _cfg("MODEL.CONTNET.VARIANT", variant, "MODEL.CONTNET.TAPS", taps)
    model = build_backbone(cfg)
    shapes = model.output_shape()
    features = model(torch.randn(2, 3, *size))
    assert model.size_divisibility == 0
    assert tuple(features) == tuple(shapes) == FEATURES
    for i, (name, feature) in enumerate(features.items()):
        assert shapes[name].stride == 4 * 2**i
        rows, columns = (math.ceil(side / shapes[name].stride) for side in size)
        assert feature.shape == (2, shapes[name].channels, rows, columns)
        assert feature.isfinite().all()
    _backward(features)
    assert not _without_gradient(model)


@pytest.mark.parametrize(("name", "opts"), PYRAMID_CASES)
def test_pyramids_keep_what_they_report(name, opts):
    cfg = _pyramid_cfg(name, *opts)
    model = build_backbone(cfg)
    shapes = model.output_shape()
    assert list(shapes) == PYRAMIDS[name]
    assert model.size_divisibility == 32
    images = ImageList.from_tensors(
        [torch.randn(3, 37, 50), torch.randn(3, 61, 40)],
        model.size_divisibility,
        padding_constraints=model.padding_constraints,
    ).tensor
    assert images.shape[-2:] == (64, 64)
    features = model(images)
    assert list(features) == list(shapes)
    for level, (level_name, feature) in enumerate(features.items(), int(PYRAMIDS[name][0][1])):
        assert level_name == f"p{level}"
        assert shapes[level_name].stride == 2**level
        # Above p5, the padded image need not be a multiple of the stride.
        side = math.ceil(64 / 2**level)
        assert feature.shape == (2, shapes[level_name].channels, side, side)
        assert feature.isfinite().all()
    _backward(features)
    assert not _without_gradient(model)


@pytest.mark.parametrize("out_features", [FEATURES, FEATURES[:3]])
def test_a_pyramid_may_end_before_res5(out_features):
    cfg = _pyramid_cfg("build_contnet_fpn_backbone", "MODEL.FPN.IN_FEATURES", ["res3", "res4"])
    cfg.MODEL.CONTNET.OUT_FEATURES = list(out_features)
    model = build_backbone(cfg)
    features = model(torch.randn(1, 3, 32, 64))
    assert list(features) == list(model.output_shape()) == ["p3", "p4", "p5"]
    for name, stride in (("p3", 8), ("p4", 16), ("p5", 32)):
        assert model.output_shape()[name].stride == stride
        assert features[name].shape[-2:] == (32 // stride, 64 // stride)
    assert torch.equal(features["p5"], features["p4"][..., ::2, ::2])
    assert len(model.bottom_up.stages) == len(out_features)
    assert not requires_res5("build_contnet_fpn_backbone")
    assert requires_res5("build_resnet_fpn_backbone")


@pytest.mark.parametrize("name", list(PYRAMIDS)[1:])
def test_pyramids_with_other_top_blocks_need_res5(name):
    assert requires_res5(name)
    cfg = _pyramid_cfg(name, "MODEL.FPN.IN_FEATURES", ["res3", "res4"])
    with pytest.raises(ValueError, match=rf"{name} needs the feature 'res5'"):
        build_backbone(cfg)


def test_top_blocks_read_the_conventional_maps():
    cfg = _pyramid_cfg("build_retinanet_contnet_fpn_backbone")
    assert build_backbone(cfg).top_block.p6.in_channels == 1024
    cfg = _pyramid_cfg("build_fcos_contnet_fpn_backbone")
    assert build_backbone(cfg).top_block.p6.in_channels == 16
    cfg = _pyramid_cfg("build_fcos_resnet_fpn_backbone")
    assert build_backbone(cfg).top_block.p6.in_channels == 16


def test_pyramid_needs_the_divisibility_it_reports():
    model = build_backbone(_pyramid_cfg("build_contnet_fpn_backbone"))
    with pytest.raises(RuntimeError, match="size"):
        model(torch.randn(1, 3, 48, 64))


def test_pyramid_pads_to_its_bottom_up():
    class Fussy(Backbone):
        size_divisibility = 48

        def output_shape(self):
            return {"res4": ShapeSpec(channels=4, stride=16), "res5": ShapeSpec(4, stride=32)}

        def forward(self, x):
            return {}

    assert DivisibleFPN(Fussy(), ["res4", "res5"], 8).size_divisibility == 96


def test_pyramid_names_a_missing_feature():
    cfg = _pyramid_cfg("build_contnet_fpn_backbone", "MODEL.CONTNET.OUT_FEATURES", ["res5"])
    with pytest.raises(ValueError, match=r"'res2'.* res5"):
        build_backbone(cfg)


def test_keys_and_features_are_the_networks_own():
    network = create_model("contnet_ti", num_classes=0).eval()
    model = build_backbone(_cfg("MODEL.CONTNET.VARIANT", "contnet_ti", "MODEL.CONTNET.NORM", "BN"))
    model.load_state_dict(network.state_dict())
    x = torch.randn(1, 3, 51, 40)
    expected = network.forward_features(x, FEATURES)
    for name, feature in model.eval()(x).items():
        torch.testing.assert_close(feature, expected[name])


@pytest.mark.parametrize(
    ("name", "prefix", "kind"),
    [
        ("build_contnet_backbone", "backbone.", "ConTNetBackbone"),
        ("build_contnet_fpn_backbone", "backbone.bottom_up.", "ConTNetBackbone"),
        ("build_resnet_fpn_backbone", "backbone.bottom_up.", "ResNet"),
    ],
)
def test_prefix_of_the_bottom_up_network(name, prefix, kind):
    cfg = _pyramid_cfg("build_contnet_fpn_backbone", "MODEL.DEVICE", "meta")
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", name, "MODEL.RPN.IN_FEATURES", ["res5"]])
    cfg.merge_from_list(["MODEL.ROI_HEADS.NAME", "StandardROIHeads"])
    levels = ["res5"] if "fpn" not in name else ["p5"]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = levels
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    with torch.device("meta"):
        model = build_model(cfg)
    assert backbone_prefix(model) == prefix
    assert type(model.get_submodule(prefix[:-1])).__name__ == kind
    assert backbone_prefix(nn.Sequential(model)) == f"0.{prefix}"


def test_prefix_of_a_network_alone_and_of_none():
    assert backbone_prefix(create_model("contnet_ti")) == ""
    with pytest.raises(ValueError, match="Linear has no backbone"):
        backbone_prefix(nn.Linear(1, 1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm, variant):
    with torch.device("meta"):
        model = ConTNetBackbone(**VARIANTS[variant], norm=norm)
    kinds = {
        "BN": nn.BatchNorm2d,
        "FrozenBN": FrozenBatchNorm2d,
        "SyncBN": nn.SyncBatchNorm,
        "naiveSyncBN": NaiveSyncBatchNorm,
        "GN": nn.GroupNorm,
    }
    for block in _blocks(model):
        assert isinstance(block.norm, kinds[norm])
        if norm == "GN":
            assert block.norm.num_channels % block.norm.num_groups == 0


@pytest.mark.parametrize("norm", NORMS)
def test_norms_train(norm):
    model = ConTNetBackbone(**VARIANTS["contnet_ti"], norm=norm)
    _backward(model(torch.randn(2, 3, 37, 50)))
    assert not _without_gradient(model)


@pytest.mark.parametrize("freeze_at", range(6))
def test_freezing_takes_the_first_parts(freeze_at):
    model = ConTNetBackbone(**VARIANTS["contnet_ti"], freeze_at=freeze_at)
    parts = [model.stem, *model.stages]
    trained = [any(p.requires_grad for p in part.parameters()) for part in parts]
    assert trained == [i >= freeze_at for i in range(5)]
    for i, stage in enumerate(model.stages, 1):
        frozen = i < freeze_at
        assert isinstance(stage[0].norm, FrozenBatchNorm2d if frozen else nn.BatchNorm2d)
    statistics = model.stages[0][0].norm.running_mean.clone()
    features = model(torch.randn(2, 3, 37, 50))
    assert torch.equal(model.stages[0][0].norm.running_mean, statistics) == (freeze_at >= 2)
    if freeze_at < 5:
        _backward(features)
        assert not _without_gradient(model)


@pytest.mark.parametrize("taps", TAPS)
def test_only_what_is_asked_for_is_built_and_trained(taps):
    model = ConTNetBackbone(**VARIANTS["contnet_ti"], taps=taps, out_features=["res4", "res2"])
    assert len(model.stages) == 3
    features = model(torch.randn(2, 3, 37, 50))
    assert tuple(features) == tuple(model.output_shape()) == ("res2", "res4")
    _backward(features)
    assert not _without_gradient(model)


def test_options_reach_the_network():
    opts = {
        "VARIANT": "contnet_b",
        "RELATIVE": True,
        "PRE_NORM": True,
        "USE_AVGDOWN": True,
        "QKV_BIAS": False,
        "DROP_PATH_RATE": 0.2,
        "LAST_DROP_RATE": 0.3,
        "GRAD_CHECKPOINTING": "mlp",
    }
    cfg = _cfg(*(item for key, v in opts.items() for item in (f"MODEL.CONTNET.{key}", v)))
    with torch.device("meta"):
        model = build_backbone(cfg, ShapeSpec(channels=4))
    block = _blocks(model)[-1]
    encoder = block.encoders[0]
    assert isinstance(model, ConTNet) and encoder.grad_checkpointing
    assert model.stem.in_channels == 4
    assert encoder.pre_norm and encoder.row_table is None and encoder.attn.qkv.bias is None
    assert encoder.mlp.drop.p == 0.1
    assert block.out_drop.p == 0.3 and block.drop_path.p == pytest.approx(0.2)
    assert model.stages[0][-1].shortcut.conv.weight.shape == (128, 64, 1, 1)


def test_activation_checkpointing_changes_nothing():
    model = ConTNetBackbone(**VARIANTS["contnet_ti"], norm="FrozenBN", freeze_at=1)
    x = torch.randn(1, 3, 37, 50)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        _backward(model(x))
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"norm": "LN"}, "norm is 'LN'"),
        ({"out_features": ["res6"]}, "no feature 'res6'"),
        ({"out_features": []}, "no features are asked for"),
        ({"freeze_at": 6}, "freeze_at is 6"),
        ({"taps": "post"}, "taps is 'post'"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        ConTNetBackbone(**VARIANTS["contnet_ti"], **wrong)


def test_unknown_variant():
    with pytest.raises(ValueError, match="'contnet_l'"):
        build_backbone(_cfg("MODEL.CONTNET.VARIANT", "contnet_l"))
