"""Tests that shipped configs build and train, and that every mistake is reported in one line."""

import json
import math

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.events import EventStorage
from leaves import CONFIGS, LEAVES, TINY, random_batch

from contnet.config import (
    add_contnet_config,
    check_values,
    load_config,
    load_finished_config,
)
from contnet.config.nodes import flatten
from contnet.engine.optimizer import build_lr_scheduler, build_optimizer
from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.build import build_model
from contnet.utils.errors import UserError

RCNN_LOSSES = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
# By the start of a config's name: losses; and batch, iterations, steps and learning rate.
SYSTEMS = {
    "faster_rcnn": (RCNN_LOSSES, (16, 90000, (60000, 80000), 0.02)),
    "mask_rcnn": ({*RCNN_LOSSES, "loss_mask"}, (16, 90000, (60000, 80000), 0.02)),
    "retinanet": ({"loss_cls", "loss_box_reg"}, (16, 90000, (60000, 80000), 0.01)),
    "fcos": (
        {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"},
        (16, 90000, (60000, 80000), 0.01),
    ),
    "cityscapes/mask_rcnn": ({*RCNN_LOSSES, "loss_mask"}, (8, 24000, (18000,), 0.01)),
    "cityscapes/pspnet": ({"loss_sem_seg", "loss_sem_seg_aux"}, (8, 80000, (30000,), 0.01)),
    "demo": (RCNN_LOSSES, None),
    "demo_imagenet": ({"loss_cls"}, None),
    "imagenet": ({"loss_cls"}, None),
    "quick/faster_rcnn": (RCNN_LOSSES, None),
    "quick/mask_rcnn": ({*RCNN_LOSSES, "loss_mask"}, None),
    "quick/cityscapes_mask_rcnn": ({*RCNN_LOSSES, "loss_mask"}, None),
    "quick/retinanet": ({"loss_cls", "loss_box_reg"}, None),
    "quick/fcos": ({"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}, None),
    "quick/cityscapes_pspnet": ({"loss_sem_seg", "loss_sem_seg_aux"}, None),
    "quick/classifier": ({"loss_cls"}, None),
}


def _write(folder, text, name="some.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def _system(name):
    return max((start for start in SYSTEMS if name.startswith(start)), key=len)


@pytest.mark.parametrize("name", LEAVES)
def test_shipped_leaves_load(name):
    cfg = load_checked_config(str(CONFIGS / f"{name}.yaml"))
    assert not cfg.is_frozen()
    assert cfg.OUTPUT_DIR.startswith(f"./output/{name.replace('/', '_')}")
    assert cfg.MODEL.WEIGHTS == ""
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]


@pytest.mark.parametrize("name", LEAVES)
def test_shipped_leaves_train_a_step(name):
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), TINY)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    with EventStorage():
        losses = model(random_batch(cfg))
    assert set(losses) == SYSTEMS[_system(name)][0]
    assert all(loss.isfinite() for loss in losses.values()), losses
    sum(losses.values()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    before = {name: p.detach().clone() for name, p in trained.items() if p.grad.any()}
    optimizer.step()
    scheduler.step()
    changed = [name for name in before if not torch.equal(before[name], trained[name])]
    # The other gradients are too small to show in one warm-up step; timm's ResNets start with
    # residuals of zero, which get no gradients.
    assert len(changed) > len(trained) / (4 if name.startswith("imagenet/res") else 2)


@pytest.mark.parametrize("system", [system for system, (_, said) in SYSTEMS.items() if said])
def test_same_schedule_for_all_backbones_of_a_system(system):
    names = [f"{system}_{backbone}" for backbone in ("contti", "conts", "contm", "contb", "r50")]
    configs = [load_config(str(CONFIGS / f"{name}.yaml")) for name in names]
    if system == "fcos":
        configs += [
            load_config(str(CONFIGS / f"fcos_plain_{name}.yaml")) for name in ("contm", "r50")
        ]
    for cfg in configs:
        clips = cfg.SOLVER.pop("CLIP_GRADIENTS")
        assert cfg.OUTPUT_DIR.startswith("./output/fcos_plain") == clips.ENABLED
        assert cfg.SOLVER == configs[0].SOLVER
        assert cfg.INPUT == configs[0].INPUT
        assert cfg.DATASETS == configs[0].DATASETS
        assert cfg.MODEL.ROI_HEADS == configs[0].MODEL.ROI_HEADS
        assert cfg.MODEL.SEM_SEG_HEAD == configs[0].MODEL.SEM_SEG_HEAD
    solver = configs[0].SOLVER
    said = (solver.IMS_PER_BATCH, solver.MAX_ITER, tuple(solver.STEPS), solver.BASE_LR)
    assert said == SYSTEMS[system][1]
    assert solver.OPTIMIZER == "SGD"


def test_variants_of_a_recipe():
    plain = load_config(str(CONFIGS / "mask_rcnn_contm.yaml"))
    scales = load_config(str(CONFIGS / "mask_rcnn_contm_ms.yaml"))
    longer = load_config(str(CONFIGS / "mask_rcnn_contm_3x.yaml"))
    mixed = load_config(str(CONFIGS / "faster_rcnn_contm_amp.yaml"))
    assert scales.SOLVER == plain.SOLVER and scales.MODEL == plain.MODEL
    assert scales.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)
    assert longer.INPUT == scales.INPUT and longer.MODEL == plain.MODEL
    assert (longer.SOLVER.MAX_ITER, longer.SOLVER.STEPS) == (270000, (210000, 250000))
    assert mixed.SOLVER.AMP.ENABLED and mixed.SOLVER.AMP.DTYPE == "bfloat16"


def test_poly_schedule_falls_to_zero():
    cfg = load_config(str(CONFIGS / "cityscapes" / "pspnet_contti.yaml"), ["SOLVER.MAX_ITER", "10"])
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for iteration in range(10):
        expected = 0.01 * (1 - iteration / 10) ** 0.9
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("width", [32, 80])
def test_groups_of_one_channel_are_refused(width):
    opts = ["MODEL.FPN.OUT_CHANNELS", str(width)]
    with pytest.raises(UserError, match="a multiple of 32, at least 64"):
        load_checked_config(str(CONFIGS / "fcos_contti.yaml"), opts)
    load_checked_config(str(CONFIGS / "fcos_contti.yaml"), [*opts, "MODEL.FCOS.NORM", ""])


def test_sync_bn_is_replaced_on_the_cpu():
    path = str(CONFIGS / "cityscapes" / "pspnet_contti.yaml")
    for device, norm in (("cuda", "SyncBN"), ("cpu", "naiveSyncBN")):
        cfg = load_config(path, ["MODEL.DEVICE", device])
        assert cfg.MODEL.CONTNET.NORM == cfg.MODEL.SEM_SEG_HEAD.NORM == norm
        assert norm == cfg.MODEL.RESNETS.NORM


def test_defaults_are_detectron2s():
    plain, cfg = get_cfg(), get_cfg()
    add_contnet_config(cfg)

    def check(node, like):
        for key, value in like.items():
            if isinstance(value, CfgNode):
                check(node[key], value)
            else:
                assert node[key] == value, key

    check(cfg, plain)
    check_values(cfg)


def test_overrides_win_and_are_decoded(tmp_path):
    path = _write(tmp_path, "SOLVER:\n  BASE_LR: 1e-4\n  STEPS: [6, 8]\n")
    assert load_config(path).SOLVER.BASE_LR == 1e-4
    opts = {
        "SOLVER.BASE_LR": "1",
        "SOLVER.STEPS": "3,4",
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE": "inf",
        "OUTPUT_DIR": "2024",
        "MODEL.WEIGHTS": "a=b.pth",
        "SOLVER.EMA.ENABLED": "True",
        "SOLVER.WEIGHT_DECAY_BIAS": "0.1",
    }
    cfg = load_config(path, [item for pair in opts.items() for item in pair])
    assert cfg.SOLVER.BASE_LR == 1.0 and isinstance(cfg.SOLVER.BASE_LR, float)
    assert cfg.SOLVER.STEPS == (3, 4)
    assert math.isinf(cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE)
    assert cfg.OUTPUT_DIR == "2024"
    assert cfg.MODEL.WEIGHTS == "a=b.pth"
    assert cfg.SOLVER.EMA.ENABLED is True
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS == 0.1


def test_a_dump_loads_again(tmp_path):
    cfg = load_config(str(CONFIGS / "faster_rcnn_contm.yaml"), ["SOLVER.OPTIMIZER", "AdamW"])
    again = load_config(_write(tmp_path, cfg.dump()))
    # As JSON, which has no tuples: nested tuples are loaded as lists.
    assert json.dumps(again) == json.dumps(cfg)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "KEY: value"),
        ("- 1", "KEY: value"),
        ("SOLVER: {BASE_LR: [}", "line 1: .*expected node content"),
        ("SOLVER:\n  STEPS: !!python/tuple [1]", "line 2: .*python/tuple.* plain values"),
        ("!!python/object/apply:os.mkdir ['x']", "line 1: .*plain values"),
        ("_BASE_: nowhere.yaml", "_BASE_ .*nowhere.yaml"),
        ("_BASE_: some.yaml", "includes itself"),
        ("_BASE_: 5", "_BASE_"),
        ("_BASE_: base.yaml\nSOLVER: {STEPS: {A: 1}}", "STEPS"),
        ("SOLVER: 3", "SOLVER is a group of keys"),
        ("SOLVER: {MAX_ITERS: 3}", r"SOLVER\.MAX_ITERS, .* SOLVER\.MAX_ITER$"),
        ("MODEL: {CONTNET: {VARIENT: x}}", "the nearest is MODEL.CONTNET.VARIANT$"),
        ("SOLVER: {MAX_ITER: many}", "SOLVER.MAX_ITER is 'many', .* type int"),
        ("SOLVER: {STEPS: null}", "SOLVER.STEPS is None, .* type tuple"),
        ("OUTPUT_DIR: [1]", "OUTPUT_DIR is \\[1\\], .* type str"),
        ("VERSION: 1", "VERSION 1, only 2"),
    ],
)
def test_wrong_files(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, "SOLVER: {STEPS: [1]}", "base.yaml")
    path = _write(tmp_path, text)
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value) and "some.yaml" in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="no config file is given"):
        load_config("")
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(UserError, match="does not exist"):
            load_config(str(path))
    (tmp_path / "bytes.yaml").write_bytes(b"A: \xff\xfe")
    with pytest.raises(UserError, match=r"bytes\.yaml"):
        load_config(str(tmp_path / "bytes.yaml"))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASE_LR"], "'SOLVER.BASE_LR' has no value"),
        (["SOLVER.BASE_LR=1"], "'SOLVER.BASE_LR=1' is one word"),
        (["SOLVER.BASE_LR=1", "SOLVER.MAX_ITER=2"], "is one word"),
        (["SOLVER.BASE_LR", "1", "--resume"], "'--resume' is not a key"),
        (["SOLVER.BASLR", "1"], "the nearest is SOLVER.BASE_LR$"),
        (["contnet.variant", "x"], "the nearest is MODEL.CONTNET.VARIANT$"),
        (["_BASE_", "x"], "no key _BASE_"),
        (["SOLVER.STEPS.X", "1"], "the nearest is SOLVER.STEPS$"),
        (["SOLVER", "1"], "group of keys"),
        (["SOLVER.STEPS", "60"], "type tuple"),
        (["SOLVER.BASE_LR", "True"], "type float"),
        (["SOLVER.IMS_PER_BATCH", "1.5"], "type int"),
        (["SOLVER.AMP.ENABLED", "yes"], "type bool"),
    ],
)
def test_wrong_overrides(opts, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(str(CONFIGS / "faster_rcnn_contm.yaml"), opts)
    assert str(caught.value).startswith("overrides: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.CONTNET.VARIANT", "contnet_l", "one of contnet_ti, contnet_s"),
        ("MODEL.CONTNET.TAPS", "post", "one of stage, pre"),
        ("MODEL.CONTNET.OUTPUT_STRIDE", "4", "one of 32, 16, 8"),
        ("MODEL.FCOS.BOX_LOSS", "diou", "one of giou, iou"),
        ("MODEL.FCOS.PRIOR_PROB", "0", r"in \(0, 1\)"),
        ("MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]", "above 0"),
        ("MODEL.RPN.POST_NMS_TOPK_TRAIN", "0", "from 1"),
        ("SOLVER.WARMUP_FACTOR", "-1", r"in \[0, inf\)"),
        ("INPUT.MASK_FORMAT", "rle", "one of polygon, bitmask"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "the smallest and the largest"),
        ("INPUT.MIN_SIZE_TRAIN", "(0,)", "whole numbers from 1"),
        ("SOLVER.STEPS", "(60000, 90000)", "remove it"),
        ("SOLVER.REFERENCE_WORLD_SIZE", "3", "must divide SOLVER.IMS_PER_BATCH 16"),
        ("MODEL.CONTNET.NORM", "LN", "one of BN, FrozenBN, SyncBN, naiveSyncBN, GN"),
        ("MODEL.CONTNET.OUT_FEATURES", "['res6']", "some of res2"),
        ("MODEL.CONTNET.OUT_FEATURES", "[]", "some of res2"),
        ("MODEL.CONTNET.OUT_FEATURES", "['res3','res4','res5']", "'res2', which MODEL.CONTNET"),
        ("MODEL.CONTNET.FREEZE_AT", "6", "0 to 5"),
        ("MODEL.CONTNET.DROP_RATE", "-0.5", "or -1 for the variant"),
        ("MODEL.CONTNET.LAST_DROP_RATE", "1.0", "or -1 for the variant"),
        ("MODEL.CONTNET.DROP_PATH_RATE", "1.0", r"in \[0, 1\)"),
        ("MODEL.FPN.IN_FEATURES", "['res5','res4']", "in this order"),
        ("MODEL.FPN.IN_FEATURES", "[]", "in this order"),
        ("MODEL.FPN.IN_FEATURES", "['res2','res4']", "without gaps"),
        ("MODEL.FPN.FUSE_TYPE", "max", "one of sum, avg"),
        ("MODEL.BACKBONE.NAME", "build_contnet", "build_contnet_fpn_backbone"),
        ("MODEL.META_ARCHITECTURE", "FasterRCNN", "GeneralizedRCNN"),
        ("MODEL.ROI_HEADS.NAME", "Heads", "one of .*StandardROIHeads"),
        ("MODEL.ROI_BOX_HEAD.NAME", "Head", "one of FastRCNNConvFCHead"),
        ("MODEL.ROI_MASK_HEAD.NAME", "Head", "one of MaskRCNNConvUpsampleHead"),
        ("MODEL.SEM_SEG_HEAD.NAME", "Head", "one of .*PSPHead"),
        ("MODEL.RPN.HEAD_NAME", "Head", "one of StandardRPNHead"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "Anchors", "one of DefaultAnchorGenerator"),
        ("MODEL.FPN.NORM", "XN", "one of '', BN, FrozenBN, SyncBN"),
        ("MODEL.RESNETS.NORM", "GN32", "one of '', BN, FrozenBN, SyncBN"),
        ("MODEL.PIXEL_STD", "[1.0]", "the same length"),
        ("SOLVER.OPTIMIZER", "adam", "one of SGD, AdamW"),
        ("SOLVER.AMP.DTYPE", "fp16", "one of float16, bfloat16"),
        ("SOLVER.FLOAT32_PRECISION", "fp32", "one of '', tf32, ieee"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "global", "one of value, norm, full_model"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0", r"in \(0, inf\)"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR", "WarmupMultiStepLR, WarmupC"),
        ("SOLVER.WARMUP_METHOD", "cosine", "one of linear, constant"),
        ("SOLVER.BASE_LR", "nan", r"in \(0, inf\)"),
        ("SOLVER.BASE_LR", "None", r"in \(0, inf\)"),
        ("SOLVER.BASE_LR_END", "1.0", "above SOLVER.BASE_LR"),
        ("SOLVER.LAYER_DECAY", "1.5", r"in \(0, 1\]"),
        ("SOLVER.BACKBONE_MULTIPLIER", "0", r"in \(0, inf\)"),
        ("SOLVER.ADAMW_BETAS", "(0.9,)", "two numbers"),
        ("SOLVER.ADAMW_BETAS", "(0.9, 1.0)", "two numbers"),
        ("SOLVER.GRAD_ACCUM_STEPS", "0", "whole number from 1"),
        ("SOLVER.GRAD_ACCUM_STEPS", "3", "not a multiple of SOLVER.GRAD_ACCUM_STEPS 3"),
        ("SOLVER.EMA.DECAY", "1.0", r"in \(0, 1\)"),
        ("SOLVER.MAX_ITER", "0", "whole number from 1"),
        ("SOLVER.STEPS", "(8, 6)", "rising"),
        ("SOLVER.CHECKPOINTS_KEPT", "0", "whole number from 1"),
        ("LOG_PERIOD", "0", "whole number from 1"),
        ("TEST.DETECTIONS_PER_IMAGE", "-1", "whole number from 1"),
        ("TEST.AUG.MAX_SIZE", "0", "whole number from 1"),
    ],
)
def test_illegal_values(key, value, message):
    with pytest.raises(UserError, match=message) as caught:
        load_checked_config(str(CONFIGS / "faster_rcnn_contm.yaml"), [key, value])
    assert key.rpartition(".")[2] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "features", "message"),
    [
        ("retinanet_contm", "['res3','res4']", r"FPN\.IN_FEATURES .* requires res5"),
        ("faster_rcnn_r50", "['res3','res4']", r"FPN\.IN_FEATURES .* requires res5"),
        (
            "faster_rcnn_contm",
            "['res3','res4','res5']",
            r"RPN\.IN_FEATURES .*'p2'.* p3, p4, p5, p6",
        ),
        (
            "faster_rcnn_contm",
            "['res2','res3','res4']",
            r"RPN\.IN_FEATURES .*'p6'.* p2, p3, p4, p5",
        ),
        ("retinanet_contm", "['res4','res5']", r"RETINANET\.IN_FEATURES .*'p3'.* p4, p5, p6, p7"),
        ("fcos_contm", "['res4','res5']", r"FCOS\.IN_FEATURES .*'p3'.* p4, p5, p6, p7"),
    ],
)
def test_levels_that_a_pyramid_lacks(config, features, message):
    with pytest.raises(UserError, match=message):
        load_checked_config(str(CONFIGS / f"{config}.yaml"), ["MODEL.FPN.IN_FEATURES", features])


def test_every_number_is_finite(tmp_path):
    """This includes Detectron2's keys, and values in lists."""
    path = str(CONFIGS / "faster_rcnn_contm.yaml")
    plain = load_config(path)
    for key, value in list(flatten(plain, plain)):
        floats = [value] if isinstance(value, float) else value
        if isinstance(floats, (list, tuple)) and floats and isinstance(floats[0], float):
            for wrong in (math.nan, math.inf):
                if (key, wrong) == ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", math.inf):
                    continue
                cfg = plain.clone()
                cfg.merge_from_list(
                    [key, wrong if floats == [value] else type(value)([*value[1:], wrong])]
                )
                with pytest.raises(UserError, match=key.replace(".", r"\.")):
                    check_values(cfg)
    for opts in (["SOLVER.GAMMA", "nan"], ["MODEL.PIXEL_MEAN", "[1e999, 1.0, 1.0]"]):
        with pytest.raises(UserError, match=opts[0]):
            load_config(path, opts)
    with pytest.raises(UserError, match="PIXEL_MEAN"):
        load_config(_write(tmp_path, "MODEL: {PIXEL_MEAN: [.nan, .inf, -.inf]}"))


def test_values_may_be_checked_again():
    cfg = load_config(str(CONFIGS / "faster_rcnn_contm.yaml"))
    check_values(cfg)
    cfg.SOLVER.NESTEROV, cfg.SOLVER.MOMENTUM = True, 0.0
    with pytest.raises(UserError, match="needs a SOLVER"):
        check_values(cfg)


def test_a_finished_config_is_read_as_it_was_written(tmp_path):
    cfg = load_config(str(CONFIGS / "faster_rcnn_contm.yaml"), ["SOLVER.MAX_ITER", "7"])
    cfg.SOLVER.GRAD_ACCUM_STEPS = 0  # not valid for training
    again = load_finished_config(_write(tmp_path, cfg.dump()))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump()) and again.is_frozen()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("BASE_LR:", "BASE_LRS:", "it lacks SOLVER.BASE_LR"),
        ("BASE_LR:", "BASE_LRS: 1\n  BASE_LR:", "SOLVER.BASE_LRS"),
        ("MAX_ITER: 90000", "MAX_ITER: many", "many"),
        ("VERSION: 2", "VERSION: 1", "VERSION 1"),
    ],
)
def test_a_finished_config_that_was_changed(tmp_path, old, new, said):
    text = load_config(str(CONFIGS / "faster_rcnn_contm.yaml")).dump()
    assert text.count(f" {old}") + text.count(f"\n{old}") == 1
    with pytest.raises(UserError, match=said) as error:
        load_finished_config(_write(tmp_path, text.replace(old, new)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
@pytest.mark.parametrize("value", ["[[]]", "[3]"])
def test_names_of_data_sets_are_texts(key, value):
    with pytest.raises(UserError, match=f"{key} is .* a list of names of data sets"):
        load_checked_config(str(CONFIGS / "mask_rcnn_contti.yaml"), [key, value])


def test_a_folder_of_no_name_is_refused():
    with pytest.raises(UserError, match=r"CACHE_DIR is .* not a path"):
        load_checked_config(str(CONFIGS / "fcos_contti.yaml"), ["DATASETS.CACHE_DIR", "a\0b"])
