"""Tests classification recipes against timm: learning rates, and what has weight decay."""

import pytest
import timm
import torch
from classifiers import config
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler

from contnet.engine.optimizer import build_lr_scheduler, build_optimizer
from contnet.modeling.build import build_model
from contnet.modeling.classifier import ImageClassifier


@pytest.mark.parametrize(
    ("leaf", "end"), [("contti", 0.0), ("contti_strong", 0.0), ("deit_ti_strong", 1e-5)]
)
def test_learning_rates_are_timms(leaf, end):
    """Warm-up, then a cosine over the whole training, as in the published code."""
    cfg = config("SOLVER.MAX_ITER", "100", "SOLVER.WARMUP_ITERS", "5", leaf=leaf)
    rate = cfg.SOLVER.BASE_LR
    ours = build_optimizer(cfg, torch.nn.Linear(2, 2))
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = build_lr_scheduler(cfg, ours)
    reference = CosineLRScheduler(
        theirs,
        t_initial=100,
        lr_min=end,
        warmup_t=5,
        warmup_lr_init=cfg.SOLVER.WARMUP_FACTOR * rate,
        t_in_epochs=False,
    )
    for iteration in range(100):
        reference.step_update(iteration)
        expected = theirs.param_groups[0]["lr"]
        # Our warm-up ends where the cosine is at that time, 0.6 % below its start.
        tolerance = 7e-3 if iteration < 5 else 1e-9
        assert ours.param_groups[0]["lr"] == pytest.approx(expected, abs=tolerance * rate)
        ours.step()
        schedule.step()
    assert ours.param_groups[0]["lr"] == pytest.approx(end, abs=1e-9 * rate)


@pytest.mark.parametrize("name", ["contti", "contb", "res18", "deit_ti"])
def test_strong_recipe_decays_only_matrices_and_filters(name):
    cfg = config(leaf=f"{name}_strong")
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {
        names[p]
        for group in optimizer.param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    tables = ("row_table", "col_table", "pos_embed", "cls_token")
    expected = {name for p, name in names.items() if p.ndim > 1 and not name.endswith(tables)}
    assert decayed == expected
    assert any(name.endswith(tables) for name in names.values()) == ("res" not in name)


@pytest.mark.parametrize(
    "name",
    [
        "convnext_atto",
        "beit_base_patch16_224",
        "deit3_small_patch16_224",
        "swin_tiny_patch4_window7_224",
        "contnet_ti",
    ],
)
def test_strong_recipe_decays_what_timm_decays(name):
    """Parameters without decay include gains of layers, biases with other names, and tables."""
    cfg = config(leaf="res18_strong")
    with torch.device("meta"):
        network = timm.create_model(name)
        model = ImageClassifier(network, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    kept = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    without, decayed = param_groups_weight_decay(network, 0.5, no_weight_decay_list=kept)
    groups = build_optimizer(cfg, model).param_groups
    ours = {group["weight_decay"]: set(map(id, group["params"])) for group in groups}
    assert ours[0.5] == set(map(id, decayed["params"]))
    assert ours[0.0] == set(map(id, without["params"]))


def test_plain_recipe_decays_gains_too():
    with torch.device("meta"):
        network = timm.create_model("convnext_atto")
        model = ImageClassifier(network, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    (group,) = build_optimizer(config(), model).param_groups
    assert group["weight_decay"] == config().SOLVER.WEIGHT_DECAY


@pytest.mark.parametrize("leaf", ["deit_ti_strong", "res18", "contti"])
def test_layer_decay_reaches_every_network(leaf):
    model = build_model(config(leaf=leaf))
    cfg = config("SOLVER.LAYER_DECAY", "0.5", leaf=leaf)
    rates = {group["lr"] for group in build_optimizer(cfg, model).param_groups}
    assert len(rates) > 2
    assert max(rates) == pytest.approx(cfg.SOLVER.BASE_LR)
