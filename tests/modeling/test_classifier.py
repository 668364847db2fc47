"""Tests the classifier against timm's parts, and mistakes in its configs."""

import numpy as np
import pytest
import torch
from classifiers import CLASSES, batch, config, normalised
from timm.data.mixup import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from contnet.modeling.build import build_model
from contnet.utils.errors import UserError

MIXED = ["MODEL.CLASSIFIER.MIXUP_ALPHA", "0.8", "MODEL.CLASSIFIER.CUTMIX_ALPHA", "1.0"]


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
    """With these seeds, both mixup and CutMix occur."""
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
    assert 5 <= mixed <= 20  # 12 are expected; fewer than 5 or more than 20 occur once in 200 runs


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
        ("res18", "SOLVER.MAX_ITER 100", "WARMUP_ITERS 25023 is not below"),
        ("res18", "INPUT.FORMAT BGR", "ImageClassifier requires RGB"),
        ("contti", "MODEL.CONTNET.FREEZE_AT 2", "FREEZE_AT is 2, which has no effect"),
        (
            "contti",
            "MODEL.CONTNET.VARIANT contnet_s",
            "VARIANT is 'contnet_s', which has no effect",
        ),
        ("contti", "MODEL.CONTNET.NORM GN", "NORM is 'GN', which has no effect"),
        ("contti", "MODEL.CONTNET.TAPS pre", "set it 'stage'"),
        ("contti", "MODEL.CONTNET.OUTPUT_STRIDE 16", "set it 32"),
        ("contti", "MODEL.CONTNET.DILATED_PATCHES False", "which has no effect"),
        ("contti", "MODEL.CONTNET.OUT_FEATURES ['res5']", "which has no effect"),
        ("res18", "MODEL.CONTNET.RELATIVE True", "has no effect on the classifier resnet18"),
        ("res50", "MODEL.RESNETS.NORM GN", "has no effect on the classifier resnet50"),
        ("res50", "MODEL.RESNETS.NUM_GROUPS 32", "NUM_GROUPS is 32, which has no effect on"),
        ("res50", "MODEL.BACKBONE.FREEZE_AT 2", "FREEZE_AT is 2, which has no effect on the clas"),
        ("contti", "MODEL.BACKBONE.FREEZE_AT 1", "set it 0"),
        ("res18", "INPUT.MIN_SIZE_TRAIN (640,)", "set it (800,) (INPUT.CLASSIFIER.SIZE is the"),
        ("res18", "INPUT.CROP.ENABLED True", "has no effect on the classifier resnet18"),
        ("res18_strong", "INPUT.CLASSIFIER.COLOR_JITTER 0.4", "has no effect with AUTO_AUGMENT"),
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
