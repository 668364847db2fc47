"""Tests the optimiser: groups, weight decay, layer decay, and gradient clipping."""

import copy
from collections import Counter

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from detectron2.solver import build_lr_scheduler
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from torch import nn

from contnet.config import add_contnet_config
from contnet.engine.optimizer import build_optimizer
from contnet.utils.errors import UserError


def _cfg(*opts):
    cfg = get_cfg()
    add_contnet_config(cfg)
    features = ["res2", "res3", "res4", "res5"]
    cfg.merge_from_list(
        [
            *("MODEL.BACKBONE.NAME", "build_contnet_fpn_backbone"),
            *("MODEL.CONTNET.VARIANT", "contnet_ti"),
            *("MODEL.CONTNET.NORM", "BN"),
            *("MODEL.FPN.IN_FEATURES", features),
            *("MODEL.RESNETS.OUT_FEATURES", features),
            *("MODEL.FPN.OUT_CHANNELS", 8),
            *("SOLVER.BASE_LR", 0.1),
            *opts,
        ]
    )
    return cfg


def _detector(cfg):
    """Builds a model with a backbone under its name in detectors, and a head."""
    model = nn.Module()
    model.backbone = build_backbone(cfg)
    model.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))
    return model


def _by_name(model, optimizer):
    """Returns the hyper-parameters of every trained parameter."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: group for group in optimizer.param_groups for p in group["params"]}


def _clip_opts(kind, value):
    node = "SOLVER.CLIP_GRADIENTS"
    return (f"{node}.ENABLED", True, f"{node}.CLIP_TYPE", kind, f"{node}.CLIP_VALUE", value)


def _set_gradients(model):
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 1.0 + i)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("MODEL.CONTNET.FREEZE_AT", 3),
        ("SOLVER.LAYER_DECAY", 0.7),
        ("SOLVER.BIAS_LR_FACTOR", 2.0),
    ],
)
def test_each_trained_parameter_is_in_one_group(kind, opts):
    cfg = _cfg("SOLVER.OPTIMIZER", kind, *opts)
    model = _detector(cfg)
    optimizer = build_optimizer(cfg, model)
    assert type(optimizer).__name__ == kind
    count = Counter(p for group in optimizer.param_groups for p in group["params"])
    assert set(count.values()) == {1}
    assert set(count) == {p for p in model.parameters() if p.requires_grad}
    hyper = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert len(hyper) == len(set(hyper))
    again = build_optimizer(cfg, model)
    for group, other in zip(optimizer.param_groups, again.param_groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in other["params"]]


def test_equals_detectron2_on_its_own_networks():
    cfg = _cfg(
        *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.NORM", "BN"),
        *("SOLVER.WEIGHT_DECAY_NORM", 0.3, "SOLVER.WEIGHT_DECAY_BIAS", 0.2),
        *("SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.NESTEROV", True),
    )
    model = _detector(cfg)
    ours = _by_name(model, build_optimizer(cfg, model))
    theirs = _by_name(model, detectron2_build_optimizer(cfg, model))
    assert set(ours) == set(theirs)
    for name in ours:
        for key in ("lr", "weight_decay", "momentum", "nesterov"):
            assert ours[name][key] == theirs[name][key]


def test_weight_decay_spares_what_the_network_names():
    cfg = _cfg("SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.OPTIMIZER", "AdamW")
    model = _detector(cfg)
    groups = _by_name(model, build_optimizer(cfg, model))
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    network = "backbone.bottom_up."
    spared = {network + name for name in model.backbone.bottom_up.no_weight_decay()}
    assert network + "stages.0.0.encoders.0.row_table" in spared
    for name, decay in decays.items():
        norm = name.startswith("head.1.")
        assert decay == (0.0 if name in spared or norm else 0.05), name
    assert len({id(group) for group in groups.values()}) == 2


def test_layer_decay_falls_from_the_head_to_the_stem():
    cfg = _cfg(
        *("MODEL.CONTNET.VARIANT", "contnet_m", "SOLVER.OPTIMIZER", "AdamW"),
        *("SOLVER.LAYER_DECAY", 0.5, "SOLVER.BACKBONE_MULTIPLIER", 0.1),
        *("SOLVER.ADAMW_BETAS", (0.8, 0.99)),
    )
    model = _detector(cfg)
    optimizer = build_optimizer(cfg, model)
    groups = _by_name(model, optimizer)
    network = "backbone.bottom_up."
    blocks = [f"stages.{i}.{j}.conv.weight" for i in range(4) for j in range(2)]
    rates = [groups[network + name]["lr"] for name in ["stem.weight", *blocks]]
    assert rates == pytest.approx([0.01 * 0.5**i for i in range(8, -1, -1)])
    assert groups["head.0.weight"]["lr"] == groups["backbone.fpn_lateral2.weight"]["lr"] == 0.1
    assert groups[network + "stages.3.1.norm.weight"]["lr"] == pytest.approx(0.01)
    assert optimizer.defaults["betas"] == (0.8, 0.99)


def test_bias_factor_and_layer_decay_multiply():
    cfg = _cfg("SOLVER.LAYER_DECAY", 0.5, "SOLVER.BIAS_LR_FACTOR", 2.0)
    model = _detector(cfg)
    groups = _by_name(model, build_optimizer(cfg, model))
    encoder = "backbone.bottom_up.stages.2.0.encoders.0.attn.qkv."
    assert groups[encoder + "weight"]["lr"] == pytest.approx(0.05)
    assert groups[encoder + "bias"]["lr"] == pytest.approx(0.1)


def test_schedule_scales_every_group():
    cfg = _cfg("SOLVER.LAYER_DECAY", 0.5, "SOLVER.WARMUP_ITERS", 0, "SOLVER.MAX_ITER", 10)
    cfg.SOLVER.STEPS = (1,)
    model = _detector(cfg)
    optimizer = build_optimizer(cfg, model)
    before = [group["lr"] for group in optimizer.param_groups]
    scheduler = build_lr_scheduler(cfg, optimizer)
    optimizer.step()
    scheduler.step()
    after = [group["lr"] for group in optimizer.param_groups]
    assert after == pytest.approx([0.1 * lr for lr in before])
    assert [group["initial_lr"] for group in optimizer.param_groups] == before


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_full_model_clipping_bounds_the_common_norm(norm_type):
    cfg = _cfg(
        *_clip_opts("full_model", 0.5),
        *("SOLVER.CLIP_GRADIENTS.NORM_TYPE", norm_type, "MODEL.CONTNET.FREEZE_AT", 1),
    )
    model = _detector(cfg)
    optimizer = build_optimizer(cfg, model)
    _set_gradients(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    ratio = trained[-1].grad.flatten()[0] / trained[0].grad.flatten()[0]
    optimizer.step()
    gradients = torch.cat([p.grad.flatten().double() for p in trained])
    assert gradients.norm(norm_type).item() == pytest.approx(0.5, rel=1e-4)
    clipped = trained[-1].grad.flatten()[0] / trained[0].grad.flatten()[0]
    assert clipped.item() == pytest.approx(ratio.item(), rel=1e-5)


def test_full_model_clipping_leaves_small_gradients():
    model = nn.Linear(2, 1)
    optimizer = build_optimizer(_cfg(*_clip_opts("full_model", 100.0)), model)
    _set_gradients(model)
    optimizer.step()
    assert model.weight.grad.tolist() == [[1.0, 1.0]]


def test_full_model_clipping_comes_after_unscaling():
    cfg = _cfg(*_clip_opts("full_model", 0.5), "SOLVER.MOMENTUM", 0.0)
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    plain = nn.Linear(3, 1)
    scaled = copy.deepcopy(plain)
    x = torch.ones(1, 3)
    optimizer = build_optimizer(cfg, plain)
    plain(x).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = build_optimizer(cfg, scaled)
    scaler.scale(scaled(x).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(plain.weight, scaled.weight)
    assert scaled.weight.grad.norm() < 0.5


@pytest.mark.parametrize(("kind", "expected"), [("value", 0.5), ("norm", 0.5 / 2**0.5)])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_clipping_of_detectron2(kind, expected, optimizer):
    cfg = _cfg(*_clip_opts(kind, 0.5), "SOLVER.OPTIMIZER", optimizer)
    model = nn.Linear(2, 1)
    optimizer = build_optimizer(cfg, model)
    _set_gradients(model)
    optimizer.step()
    assert model.weight.grad.tolist() == [[pytest.approx(expected, rel=1e-4)] * 2]


def test_no_clipping_unless_enabled():
    model = nn.Linear(2, 1)
    optimizer = build_optimizer(_cfg("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.1), model)
    _set_gradients(model)
    optimizer.step()
    assert model.weight.grad.tolist() == [[1.0, 1.0]]


def test_layer_decay_needs_layer_groups():
    cfg = _cfg("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "SOLVER.LAYER_DECAY", 0.7)
    with pytest.raises(UserError, match="ResNet has no layer groups"):
        build_optimizer(cfg, _detector(cfg))
    with pytest.raises(UserError, match="Linear has no backbone"):
        build_optimizer(cfg, nn.Linear(1, 1))


def test_multiplier_works_on_any_backbone():
    cfg = _cfg(
        *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
        *("SOLVER.BACKBONE_MULTIPLIER", 0.25),
    )
    model = _detector(cfg)
    groups = _by_name(model, build_optimizer(cfg, model))
    assert groups["backbone.bottom_up.res5.0.conv1.weight"]["lr"] == 0.025
    assert groups["backbone.fpn_output3.weight"]["lr"] == 0.1


def test_nothing_to_train():
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer(_cfg(), nn.Linear(1, 1).requires_grad_(False))
