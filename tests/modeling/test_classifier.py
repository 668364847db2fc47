"""Classification: the model against timm's parts, accuracy against a plain loop, weights."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import REPOSITORY, finish
from detectron2.config import CfgNode
from imagenet import draw_picture
from oracle import make_oracle
from PIL import Image
from timm.data.mixup import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torchvision.transforms import v2

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.key_mapping import detectron2_name
from contnet.commands.convert_weights import main as convert_weights
from contnet.config import load_config
from contnet.data.datasets import imagenet
from contnet.data.datasets.register import register_datasets
from contnet.data.pipeline.transforms import build_classification_transform
from contnet.engine.optimizer import build_lr_scheduler, build_optimizer
from contnet.engine.trainer import Trainer
from contnet.evaluation.classification import ClassificationEvaluator
from contnet.evaluation.metrics import check_best_metric
from contnet.launch.main import main
from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.build import build_model
from contnet.modeling.classifier import ImageClassifier
from contnet.utils.errors import UserError

CLASSES = 10
SMALL = ["MODEL.DEVICE", "cpu", "MODEL.CLASSIFIER.NUM_CLASSES", str(CLASSES)]
MIXED = ["MODEL.CLASSIFIER.MIXUP_ALPHA", "0.8", "MODEL.CLASSIFIER.CUTMIX_ALPHA", "1.0"]
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)


def config(*opts, leaf="contti") -> CfgNode:
    return load_checked_config(
        str(REPOSITORY / "configs" / "imagenet" / f"{leaf}.yaml"), [*SMALL, *opts]
    )


def batch(count=4, size=64):
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    return [{"image": image, "label": (3 * i) % CLASSES} for i, image in enumerate(images)]


def normalised(inputs):
    return torch.stack([(each["image"] - MEAN) / STD for each in inputs])


# ------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", ["contti", "res18", "deit_ti_strong"])
def test_logits_are_the_networks_own(leaf):
    model = build_model(config(leaf=leaf)).eval()
    inputs = batch()
    with torch.no_grad():
        expected = model.network(normalised(inputs))
        found = torch.stack([each["logits"] for each in model(inputs)])
    assert found.shape == (4, CLASSES)
    assert torch.allclose(found, expected, atol=1e-5)
    assert expected.std() > 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_without_mixing_is_timms(smoothing):
    model = build_model(config("MODEL.CLASSIFIER.LABEL_SMOOTHING", str(smoothing))).train()
    inputs = batch()
    labels = torch.tensor([each["label"] for each in inputs])
    losses = model(inputs)
    expected = LabelSmoothingCrossEntropy(smoothing)(model.network(normalised(inputs)), labels)
    assert losses.keys() == {"loss_cls"}
    assert losses["loss_cls"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_mixed_loss_is_timms(seed):
    """Over these seeds both mixup and CutMix occur."""
    model = build_model(config(*MIXED, "MODEL.CLASSIFIER.LABEL_SMOOTHING", "0.1")).train()
    inputs = batch()
    labels = torch.tensor([each["label"] for each in inputs])
    mix = Mixup(0.8, 1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=CLASSES)
    np.random.seed(seed)
    images, targets = mix(normalised(inputs), labels)
    expected = SoftTargetCrossEntropy()(model.network(images), targets)
    np.random.seed(seed)
    assert model(inputs)["loss_cls"].item() == pytest.approx(expected.item(), rel=1e-5)
    plain = torch.nn.functional.cross_entropy(model.network(normalised(inputs)), labels)
    assert plain.item() != pytest.approx(expected.item(), rel=1e-4)


def test_only_a_share_of_batches_is_mixed():
    model = build_model(config(*MIXED, "MODEL.CLASSIFIER.MIX_PROB", "0.3")).train()
    inputs, seen = batch(size=32), []
    model.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for _ in range(40):
        model(inputs)
    mixed = sum(not torch.allclose(images, normalised(inputs), atol=1e-5) for images in seen)
    assert 5 <= mixed <= 20  # 12 are expected, and fewer than 5 or more than 20 once in 200 tries


def test_images_are_erased_in_training_only():
    model = build_model(config("INPUT.CLASSIFIER.RANDOM_ERASING", "1.0"))
    inputs, seen = batch(), []
    model.network.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    model.train()(inputs)
    model.eval()(inputs)
    changed = (seen[0] - normalised(inputs)).abs().amax(dim=1) > 1e-4
    share = changed.float().mean(dim=(1, 2))
    assert (share > 0.01).all() and (share < 0.4).all()
    assert torch.allclose(seen[1], normalised(inputs), atol=1e-5)


def test_channels_last_is_the_same_function():
    plain = build_model(config()).eval()
    model = build_model(config("MODEL.CLASSIFIER.CHANNELS_LAST", "True")).eval()
    model.load_state_dict(plain.state_dict())
    seen = []
    model.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = batch(size=50)
    with torch.no_grad():
        pairs = zip(plain(inputs), model(inputs), strict=True)
    assert all(torch.allclose(a["logits"], b["logits"], atol=1e-4) for a, b in pairs)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert model.network.stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_contnets_take_their_options_from_their_node():
    keys = "RELATIVE True USE_AVGDOWN True QKV_BIAS False PRE_NORM True GRAD_CHECKPOINTING block"
    opts = [word if i % 2 else f"MODEL.CONTNET.{word}" for i, word in enumerate(keys.split())]
    network = build_model(config(*opts, "MODEL.CONTNET.DROP_PATH_RATE", "0.3")).network
    names = network.state_dict().keys()
    assert any(name.endswith("bias_table") for name in names)
    assert not any(name.endswith("qkv.bias") for name in names)
    assert network.grad_checkpointing
    rates = [m.p for m in network.modules() if type(m).__name__ == "StochasticDepth"]
    assert max(rates) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("leaf", "opts", "message"),
    [
        ("contti", "MODEL.CLASSIFIER.NAME resnet5O", "nearest is resnet50"),
        ("contti", "MODEL.CLASSIFIER.DROP_PATH_RATE 0.1", "takes its options from MODEL.CONTNET"),
        ("res18", "INPUT.CLASSIFIER.AUTO_AUGMENT rand-x9", "AUTO_AUGMENT is 'rand-x9'"),
        ("res18", "INPUT.CLASSIFIER.AUTO_AUGMENT auto", "AUTO_AUGMENT is 'auto'"),
        ("res18", "INPUT.CLASSIFIER.CROP_TEST 288", "CROP_TEST 288 exceeds RESIZE_TEST 256"),
        ("res18", "INPUT.CLASSIFIER.SCALE [0.5]", "SCALE is"),
        ("res18", "MODEL.CLASSIFIER.OPTIONS ['a']", "must be a list of [name, value]"),
        ("res18", "SOLVER.MAX_ITER 100", "WARMUP_ITERS is 25023, with SOLVER.RESCALE_INTERVAL"),
        ("res18", "SOLVER.WARMUP_ITERS 0", "WARMUP_ITERS is 0, with SOLVER.RESCALE_INTERVAL"),
        ("res18", "INPUT.FORMAT BGR", "ImageClassifier takes RGB"),
        ("contti", "MODEL.CONTNET.FREEZE_AT 2", "FREEZE_AT is 2, which does nothing"),
        ("contti", "MODEL.CONTNET.VARIANT contnet_s", "VARIANT is 'contnet_s', which does nothing"),
        ("contti", "MODEL.CONTNET.NORM GN", "NORM is 'GN', which does nothing"),
        ("contti", "MODEL.CONTNET.TAPS pre", "set it 'stage'"),
        ("contti", "MODEL.CONTNET.OUTPUT_STRIDE 16", "set it 32"),
        ("contti", "MODEL.CONTNET.DILATED_PATCHES False", "which does nothing"),
        ("contti", "MODEL.CONTNET.OUT_FEATURES ['res5']", "which does nothing"),
        ("res18", "MODEL.CONTNET.RELATIVE True", "does nothing to the classifier resnet18"),
        ("res50", "MODEL.RESNETS.NORM GN", "does nothing to the classifier resnet50"),
        ("res50", "MODEL.RESNETS.NUM_GROUPS 32", "NUM_GROUPS is 32, which does nothing to"),
        ("res50", "MODEL.BACKBONE.FREEZE_AT 2", "FREEZE_AT is 2, which does nothing to the clas"),
        ("contti", "MODEL.BACKBONE.FREEZE_AT 1", "set it 0"),
        ("res18", "INPUT.MIN_SIZE_TRAIN (640,)", "set it (800,) (INPUT.CLASSIFIER.SIZE is the"),
        ("res18", "INPUT.CROP.ENABLED True", "does nothing to the classifier resnet18"),
        ("res18_strong", "INPUT.CLASSIFIER.COLOR_JITTER 0.4", "does nothing with AUTO_AUGMENT"),
        ("res18", "MODEL.CLASSIFIER.MIXUP_ALPHA -1", "must be in [0, inf)"),
    ],
)
def test_mistakes_are_one_line(leaf, opts, message):
    with pytest.raises(UserError) as caught:
        config(*opts.split(), leaf=leaf)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("leaf", "option"), [("res18", ["no_such", 1]), ("deit_ti_strong", ["global_pool", "no_such"])]
)
def test_options_that_timm_refuses_are_one_line(leaf, option):
    cfg = config("MODEL.CLASSIFIER.OPTIONS", str([option]), leaf=leaf)
    with pytest.raises(UserError, match=f"timm .*{option[0]}"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("options", "key", "size"),
    [
        ("[['dynamic_img_size', True]]", "CROP_TEST", 230),
        ("[['dynamic_img_size', True]]", "SIZE", 100),
        ("[]", "CROP_TEST", 160),
    ],
)
def test_a_size_that_the_network_does_not_take_is_told_before_training(options, key, size):
    opts = ["MODEL.CLASSIFIER.OPTIONS", options, f"INPUT.CLASSIFIER.{key}", str(size)]
    with pytest.raises(UserError, match=f"{key} is {size}, .*deit_tiny_patch16_224"):
        build_model(config(*opts, leaf="deit_ti_strong"))


def test_a_deit_takes_other_whole_numbers_of_patches():
    sizes = ["INPUT.CLASSIFIER.SIZE", "96", "INPUT.CLASSIFIER.CROP_TEST", "160"]
    model = build_model(config(*sizes, leaf="deit_ti_strong")).eval()
    with torch.no_grad():
        assert len(model(batch(size=160))) == 4


# ------------------------------------------------------------------------------
# Recipes
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", ["contti", "contti_strong"])
def test_learning_rates_are_timms(leaf):
    cfg = config("SOLVER.MAX_ITER", "100", "SOLVER.WARMUP_ITERS", "20", leaf=leaf)
    rate = cfg.SOLVER.BASE_LR
    ours = build_optimizer(cfg, torch.nn.Linear(2, 2))
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = build_lr_scheduler(cfg, ours)
    reference = CosineLRScheduler(
        theirs, t_initial=80, warmup_t=20, warmup_prefix=True, t_in_epochs=False
    )
    for iteration in range(100):
        reference.step_update(iteration)
        expected = theirs.param_groups[0]["lr"]
        assert ours.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-9 * rate)
        ours.step()
        schedule.step()
    assert ours.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9 * rate)


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
    """Among what it spares are gains of layers, biases by other names and tables."""
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


def test_training_images_differ_by_seed_and_policy():
    picture = draw_picture(1, CLASSES, 90, np.random.default_rng(0))
    outputs = []
    for policy in ("''", "rand-m9-mstd0.5-inc1", "original"):
        cfg = config("INPUT.CLASSIFIER.AUTO_AUGMENT", policy, "INPUT.CLASSIFIER.SIZE", "32")
        transform = build_classification_transform(cfg, is_train=True)
        for seed in (1, 2, 1):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            outputs.append(transform(picture))
            assert outputs[-1].shape == (3, 32, 32) and outputs[-1].dtype == torch.uint8
        assert torch.equal(outputs[-1], outputs[-3])
    # All of three policies and two seeds.
    assert len({each.numpy().tobytes() for each in outputs}) == 6


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (182, 160), (61, 61), (320, 288)])
def test_test_images_are_resized_and_cropped_in_the_middle(resize, crop):
    picture = draw_picture(0, CLASSES, 100, np.random.default_rng(0))
    sizes = ["INPUT.CLASSIFIER.RESIZE_TEST", str(resize), "INPUT.CLASSIFIER.CROP_TEST", str(crop)]
    found = build_classification_transform(config(*sizes), is_train=False)(picture)
    width = int(resize * picture.width / picture.height)
    resized = picture.resize((width, resize), Image.Resampling.BILINEAR)
    top, left = round((resize - crop) / 2), round((width - crop) / 2)
    cut = resized.crop((left, top, left + crop, top + crop))
    assert torch.equal(found, v2.functional.pil_to_tensor(cut))


# ------------------------------------------------------------------------------
# Accuracy
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 3, 5, 6, 10])
def test_accuracy_is_that_of_a_plain_loop(classes):
    logits = torch.randn(37, classes)
    labels = torch.randint(0, classes, (37,)).tolist()
    evaluator = ClassificationEvaluator(classes)
    evaluator.reset()
    for start in range(0, 37, 8):
        rows = range(start, min(start + 8, 37))
        evaluator.process(
            [{"label": labels[i]} for i in rows], [{"logits": logits[i]} for i in rows]
        )
    # Of five classes or fewer, one of the first five is always right.
    top = {1: 0, 5: 0} if classes > 5 else {1: 0}
    for row, label in zip(logits.tolist(), labels, strict=True):
        order = sorted(range(classes), key=lambda i: -row[i])
        for k in top:
            top[k] += label in order[:k]
    expected = {f"top{k}": 100 * number / 37 for k, number in top.items()}
    assert evaluator.evaluate() == {"classification": expected}
    cfg = config("MODEL.CLASSIFIER.NUM_CLASSES", str(classes), "TEST.BEST_METRIC", "no")
    register_datasets(cfg)
    with pytest.raises(UserError) as caught:
        check_best_metric(cfg)
    assert ("classification/top5" in str(caught.value)) == (classes > 5)


def test_logits_that_are_not_finite_are_wrong_and_named(caplog):
    evaluator = ClassificationEvaluator(3)
    broken = torch.tensor([float("nan"), 1.0, 0.0])
    evaluator.process(
        [{"label": 0}, {"label": 0}], [{"logits": broken}, {"logits": torch.tensor([2.0, 1, 0])}]
    )
    assert evaluator.evaluate()["classification"] == {"top1": 50.0}
    assert "1 of 2 images have logits that are not finite" in caplog.text


# ------------------------------------------------------------------------------
# Weights
# ------------------------------------------------------------------------------


@pytest.fixture
def said(caplog):
    with caplog.at_level("INFO", logger="fvcore.common.checkpoint"):
        yield lambda: " ".join(record.getMessage() for record in caplog.records)


def test_a_trained_classifier_becomes_a_backbone(tmp_path, said):
    model = build_model(config())
    Checkpointer(model, str(tmp_path)).save("model_final")
    leaf = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
    detector = build_model(load_config(leaf, ["MODEL.DEVICE", "cpu"]))
    Checkpointer(detector).load_backbone(str(tmp_path / "model_final.pth"))
    state = detector.backbone.bottom_up.state_dict()
    own = model.network.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in state.items())
    assert f"{len(state)} of the {len(state)}" in said()


def test_a_trained_resnet_becomes_a_backbone(tmp_path):
    model = build_model(config(leaf="res50"))
    Checkpointer(model, str(tmp_path)).save("model_final")
    leaf = str(REPOSITORY / "configs" / "faster_rcnn_r50.yaml")
    detector = build_model(load_config(leaf, ["MODEL.DEVICE", "cpu"]))
    Checkpointer(detector).load_backbone(str(tmp_path / "model_final.pth"))
    stem = detector.backbone.bottom_up.stem.conv1.weight
    assert torch.equal(stem, model.network.conv1.weight)


def test_a_resnet_in_detectron2s_names_becomes_a_classifier(tmp_path):
    network = timm.create_model("resnet18", num_classes=CLASSES)
    state = {detectron2_name(name): value for name, value in network.state_dict().items()}
    assert "stem.conv1.weight" in state
    torch.save(state, tmp_path / "a.pth")
    model = build_model(config(leaf="res18"))
    Checkpointer(model).load_checkpoint(str(tmp_path / "a.pth"))
    own = network.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in model.network.state_dict().items())


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_authors_checkpoint_gives_their_logits(tmp_path, wrapped):
    theirs = make_oracle("contnet_ti", num_classes=CLASSES)
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"model": state, "epoch": 3} if wrapped else theirs.state_dict(), tmp_path / "a.pth")
    model = build_model(config()).eval()
    Checkpointer(model).load_checkpoint(str(tmp_path / "a.pth"))
    inputs = batch(size=224)
    with torch.no_grad():
        found = torch.stack([each["logits"] for each in model(inputs)])
        expected = theirs(normalised(inputs))
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("leaf", "name"), [("res18", "resnet18"), ("contti", "contnet_ti")])
def test_bare_weights_of_timm_load_whole(tmp_path, leaf, name):
    network = timm.create_model(name, num_classes=CLASSES)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    model = build_model(config(leaf=leaf))
    Checkpointer(model).load_checkpoint(str(tmp_path / "a.pth"))
    own = network.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in model.network.state_dict().items())


def test_another_number_of_classes_keeps_all_but_the_head(tmp_path, said):
    network = timm.create_model("contnet_ti", num_classes=7)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    model = build_model(config())
    before = model.network.head.weight.clone()
    Checkpointer(model).load_backbone(str(tmp_path / "a.pth"))
    assert torch.equal(model.network.head.weight, before)
    assert torch.equal(model.network.stem.weight, network.stem.weight)
    assert "head starts from random weights" in said()
    with pytest.raises(UserError, match=r"another shape .*MODEL.CLASSIFIER.NUM_CLASSES"):
        Checkpointer(model).load_checkpoint(str(tmp_path / "a.pth"))


def test_leftovers_and_averages_that_are_not_loaded_are_told(tmp_path, said):
    state = {**make_oracle("contnet_ti", num_classes=CLASSES).state_dict(), "odd": torch.zeros(1)}
    torch.save({"model": state, "model_ema": state}, tmp_path / "a.pth")
    Checkpointer(build_model(config())).load_backbone(str(tmp_path / "a.pth"))
    assert "1 tensors are no part of a ConTNet and are left out (odd)" in said()
    assert "also has EMA weights ('model_ema')" in said()


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(timm.create_model("resnet18", num_classes=CLASSES).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="are not in it"):
        Checkpointer(build_model(config(leaf="res50"))).load_backbone(str(tmp_path / "a.pth"))


# ------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------

RUN_OPTIONS = """
INPUT.CLASSIFIER.SIZE 56 INPUT.CLASSIFIER.RESIZE_TEST 64 INPUT.CLASSIFIER.CROP_TEST 56
SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 3 SOLVER.WARMUP_ITERS 1 LOG_PERIOD 1 TEST.IMS_PER_PROCESS 3
"""
RUN = RUN_OPTIONS.split()
LEAF = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
SEVEN = [*SMALL, *RUN, "MODEL.CLASSIFIER.NUM_CLASSES", "7"]


@pytest.fixture
def command(train_net, imagenet_root, tmp_path):
    """Runs train_net.py on the seven classes into tmp_path; returns what it printed."""

    def run(options: str) -> str:
        words = [*SEVEN, "OUTPUT_DIR", str(tmp_path)]
        root = str(imagenet_root)
        return finish(
            train_net(f"--config-file {LEAF} {options}", *words, DETECTRON2_DATASETS=root)
        )

    return run


def plain_loop(cfg, folder: Path, weights: Path):
    """Top-1 and top-5 of a checkpoint, image by image, without any of our loading."""
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(weights)["model"])
    top, count = {1: 0, 5: 0}, 0
    for label, each in enumerate(sorted(folder.iterdir())):
        for file in sorted(each.iterdir()):
            image = Image.open(file).convert("RGB")
            width = int(64 * image.width / image.height)
            small = image.resize((width, 64), Image.Resampling.BILINEAR)
            pixels = v2.functional.center_crop(v2.functional.pil_to_tensor(small), [56, 56])
            with torch.no_grad():
                logits = model.network(((pixels - MEAN) / STD)[None])[0]
            order = logits.argsort(descending=True).tolist()
            for k in top:
                top[k] += label in order[:k]
            count += 1
    return {f"top{k}": 100 * number / count for k, number in top.items()}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_trains_evaluates_and_tells_the_accuracy(command, imagenet_root, tmp_path, processes):
    output = command(f"--num-gpus {processes}")
    (result,) = json.loads((tmp_path / "results.json").read_text())
    cfg = load_config(LEAF, SEVEN)
    val = imagenet_root / "imagenet" / "val"
    expected = plain_loop(cfg, val, tmp_path / "model_final.pth")
    assert result["metrics"]["classification"] == pytest.approx(expected)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[-1]["classification/top1"] == pytest.approx(expected["top1"])
    assert (tmp_path / "model_best.pth").exists()
    assert "| classification |" in output


@pytest.mark.parametrize("batch", ["3", "6 SOLVER.GRAD_ACCUM_STEPS 2"])
def test_an_odd_batch_cannot_be_mixed(tmp_path, capsys, batch):
    opts = f"MODEL.CLASSIFIER.CUTMIX_ALPHA 1.0 OUTPUT_DIR {tmp_path} SOLVER.IMS_PER_BATCH {batch}"
    assert main(["--config-file", LEAF, *SMALL, *RUN, *opts.split()]) == 1
    error = capsys.readouterr().err
    assert "not 3" in error
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.fixture(scope="module")
def trained(imagenet_root, tmp_path_factory) -> Path:
    """The folder of a short run on the seven classes, as sets of one's own."""
    folder = tmp_path_factory.mktemp("run")
    opts = ["SOLVER.CHECKPOINT_PERIOD", "3", "OUTPUT_DIR", str(folder)]
    options = ["--config-file", LEAF, *SMALL[:2], *RUN, *own_sets(imagenet_root / "imagenet")]
    assert main([*options, "DATALOADER.NUM_WORKERS", "0", "SEED", "1", *opts]) == 0
    return folder


def own_sets(home: Path) -> list[str]:
    """Both sets by names of this test's own, which stand for their paths."""
    sets = [[f"{home}_{split}", str(home / split)] for split in ("train", "val")]
    train, val = (f"('{name}',)" for name, _ in sets)
    return ["DATASETS.REGISTER", str(sets), "DATASETS.TRAIN", train, "DATASETS.TEST", val]


def evaluate_alone(home: Path, weights: Path, output: Path, *opts: str) -> int:
    return main(
        [
            *("--config-file", LEAF, "--eval-only", *SMALL[:2], *RUN, *own_sets(home), *opts),
            *("DATALOADER.NUM_WORKERS", "0", "MODEL.WEIGHTS", str(weights)),
            *("OUTPUT_DIR", str(output)),
        ]
    )


@pytest.mark.slow
def test_evaluation_alone_as_a_command(command, trained, tmp_path):
    command(f"--eval-only MODEL.WEIGHTS {trained}/model_final.pth")
    (alone,) = json.loads((tmp_path / "results.json").read_text())
    (training,) = json.loads((trained / "results.json").read_text())
    assert alone["metrics"] == training["metrics"]
    assert alone["weights"] == f"{trained}/model_final.pth"


@pytest.mark.slow
def test_evaluation_alone_lists_its_set_once(imagenet_root, trained, tmp_path, monkeypatch):
    """After the check before the run, which is another listing."""
    listed, read = [], imagenet.read_set
    monkeypatch.setattr(imagenet, "read_set", lambda *args: listed.append(args) or read(*args))
    home, weights = imagenet_root / "imagenet", trained / "model_final.pth"
    assert evaluate_alone(home, weights, tmp_path) == 0
    assert len(listed) == 1


def _reorder(val: Path) -> None:
    val.joinpath("n00000001").rename(val / "n00000009")


def _lose(val: Path) -> None:
    shutil.rmtree(val / "n00000003")


@pytest.mark.slow
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_reorder, "7 classes are not the 7 that {} was trained on (1 too many: n00000009; 1 mis"),
        (_lose, "6 classes are not the 7 that {} was trained on (1 missing: n00000003)"),
    ],
    ids=["renamed", "lost"],
)
def test_evaluation_alone_on_other_classes_is_refused(
    imagenet_root, trained, tmp_path, capsys, converted, change, said
):
    """Without its training set, a set would number its classes by itself."""
    home, weights = tmp_path / "imagenet", trained / "model_final.pth"
    shutil.copytree(imagenet_root / "imagenet", home)
    if converted:
        assert convert_weights([str(weights), str(tmp_path / "a.safetensors")]) == 0
        weights = Path(capsys.readouterr().out.splitlines()[-1])
    change(home / "val")
    assert evaluate_alone(home, weights, tmp_path / "out") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the data's ") and said.format(weights) in error


@pytest.mark.slow
def test_a_resume_on_other_classes_is_refused(imagenet_root, trained, tmp_path):
    shutil.copytree(imagenet_root / "imagenet", tmp_path / "imagenet")
    for split in ("train", "val"):
        _reorder(tmp_path / "imagenet" / split)
    cfg = config(*RUN, *own_sets(tmp_path / "imagenet"), "MODEL.CLASSIFIER.NUM_CLASSES", "7")
    register_datasets(cfg)
    cfg.OUTPUT_DIR = str(trained)
    with pytest.raises(UserError, match=r"1 too many: n00000009; 1 missing: n00000001"):
        Trainer(cfg, 1).load(resume=True)


def test_weights_that_do_not_name_their_classes_are_told(tmp_path, said):
    model = build_model(config())
    Checkpointer(model, str(tmp_path)).save("a")
    Checkpointer(model, classes=["a", "b"]).load_checkpoint(str(tmp_path / "a.pth"))
    assert f"{tmp_path}/a.pth does not name its classes" in said()
