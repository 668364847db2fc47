"""Tests tools/analyze.py: the costs of a model of each system, whose parts add up to the total."""

import json

import pytest
import torch
from leaves import CONFIGS
from torch import nn

from contnet.commands.analyze import analyze, main
from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.costs import count_saved
from contnet.modeling.macs import build_meta_model, count_macs

SMALL = (60, 90)
SYSTEMS = [
    "imagenet/contti_strong",
    "imagenet/res18",
    "retinanet_contti",
    "fcos_contti",
    "fcos_plain_r50",
    "faster_rcnn_contti",
    "mask_rcnn_contti",
    "cityscapes/mask_rcnn_r50",
    "cityscapes/pspnet_contti",
]
CPU = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "50"),
    *("TEST.DETECTIONS_PER_IMAGE", "10"),
]


def config(name, *opts):
    return load_checked_config(str(CONFIGS / f"{name}.yaml"), [*CPU, *opts])


def costs_of(name, *opts, size=SMALL, **options):
    return analyze(config(name, *opts), size, rounds=1, **options)


def own(costs, key):
    """Returns each module's costs without those of its children."""
    modules = {each["name"]: each[key] for each in costs["modules"]}
    below = dict.fromkeys(modules, 0)
    for name, value in modules.items():
        if name:
            below[name.rpartition(".")[0]] += value
    return {name: value - below[name] for name, value in modules.items()}


@pytest.mark.parametrize("name", SYSTEMS)
def test_parts_add_up_to_the_whole(name):
    costs = costs_of(name)
    cfg = config(name)
    model = build_meta_model(cfg)
    names = [each["name"] for each in costs["modules"]]
    assert names == [name for name, _ in model.named_modules()]

    parameters = own(costs, "parameters")
    assert sum(parameters.values()) == sum(each.numel() for each in model.parameters())
    for name, module in model.named_modules():
        assert parameters[name] == sum(each.numel() for each in module.parameters(recurse=False))

    macs = count_macs(cfg, model, tuple(costs["padded_size"]))
    attention = macs.pop("attention", 0)
    total = costs["total"]
    assert total["attention_macs"] == pytest.approx(1e9 * attention, abs=1)
    assert total["macs"] == pytest.approx(1e9 * macs.total(), abs=1) and total["macs"] > 0
    # The MACs of each module are rounded to integers.
    assert all(min(own(costs, key).values()) > -200 for key in ("macs", "attention_macs"))

    for key in ("activations", "activation_bytes"):
        assert min(own(costs, key).values()) >= 0 and total[key] > 0
    assert total["activation_bytes"] >= total["activations"]
    assert all(0 <= each["seconds"] <= 1.01 * total["seconds"] for each in costs["modules"])
    step = costs["training_step"]
    assert step["least_peak_bytes"] == sum(step.values()) - step["least_peak_bytes"]
    assert step["gradients_bytes"] == 4 * total["trained_parameters"]


def test_macs_are_where_they_are_computed():
    """MACs of a convolution are positions x the size of the weight, plus the biases."""
    costs = costs_of("fcos_contti")
    modules = {each["name"]: each["macs"] for each in costs["modules"]}
    height, width = costs["padded_size"]
    model = build_meta_model(config("fcos_contti"))
    convolution = model.get_submodule("backbone.fpn_output3")
    places = (height // 8) * (width // 8)
    weights = convolution.weight.numel() + convolution.bias.numel()
    assert modules["backbone.fpn_output3"] == places * weights
    places = sum(-(-height // stride) * -(-width // stride) for stride in (8, 16, 32, 64, 128))
    convolution = model.get_submodule("head.cls_score")
    assert modules["head.cls_score"] == places * (
        convolution.weight.numel() + convolution.bias.numel()
    )


def test_attention_is_the_attentions():
    costs = costs_of("faster_rcnn_contti")
    for name, number in own(costs, "attention_macs").items():
        assert (number > 0) == name.endswith(".attn"), name


def test_what_is_kept_is_what_autograd_keeps():
    """The toy keeps the inputs of convolutions and the outputs of ReLUs."""

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.relu = nn.ReLU()
            self.second = nn.Conv2d(8, 4, 1)

        def forward(self, images):
            return self.second(self.relu(self.first(images)))

    kept = count_saved(config("imagenet/res18"), Toy(), torch.zeros(2, 3, 5, 7))
    numbers = {name: counts["numbers"] for name, counts in kept.items()}
    # The ReLU already keeps the input of the second convolution.
    assert numbers == {"": 0, "first": 2 * 3 * 35, "relu": 2 * 8 * 35, "second": 0}
    assert kept["first"]["bytes"] == 4 * numbers["first"]


def test_memory_follows_the_config():
    plain = costs_of("fcos_contti")
    less = costs_of("fcos_contti", "MODEL.CONTNET.GRAD_CHECKPOINTING", "block")
    assert less["total"]["activation_bytes"] < 0.8 * plain["total"]["activation_bytes"]
    half = costs_of("fcos_contti", "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16")
    # Activations of the backbone, which include half-precision copies of the weights.
    kept = [
        next(each for each in costs["modules"] if each["name"] == "backbone.bottom_up.stages.0")
        for costs in (plain, half)
    ]
    assert kept[1]["activation_bytes"] < 0.7 * kept[0]["activation_bytes"]
    more = costs_of("fcos_contti", batch=4)
    assert more["total"]["activation_bytes"] == pytest.approx(
        2 * plain["total"]["activation_bytes"], rel=0.1
    )
    assert more["total"]["macs"] == plain["total"]["macs"]
    adam = costs_of("fcos_contti", "SOLVER.OPTIMIZER", "AdamW", "SOLVER.EMA.ENABLED", "True")
    step, before = adam["training_step"], plain["training_step"]
    assert step["optimizer_bytes"] == pytest.approx(2 * before["optimizer_bytes"], rel=0.001)
    assert (before["ema_bytes"], step["ema_bytes"]) == (0, step["weights_bytes"])


def test_the_command(tmp_path, capsys):
    file = tmp_path / "costs.json"
    argv = ["--config-file", str(CONFIGS / "cityscapes" / "pspnet_contti.yaml"), "--size", "64x64"]
    options = ["--batch", "2", "--rounds", "1", "--depth", "1", "--json", str(file)]
    assert main([*argv, *options, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5"]) == 0
    printed = capsys.readouterr().out
    costs = json.loads(file.read_text())
    assert costs["system"] == "PSPNet" and costs["classes"] == 5 and costs["size"] == [64, 64]
    for name in ("backbone", "sem_seg_head"):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  {name} (")]
        (module,) = [each for each in costs["modules"] if each["name"] == name]
        assert f"{module['parameters'] / 1e6:.3f}" in line.split()
        assert f"{module['macs'] / 1e9:.3f}" in line.split()
    assert "    stem (" not in printed
    assert all(word in printed for word in ("counted", "measured", "estimated"))


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("fcos_contti", ["--size", "64"]),
        ("fcos_contti", ["--size", "0x64"]),
        ("fcos_contti", ["--size", "64x64", "--batch", "0"]),
        # Vision transformers of timm have a fixed size; BatchNorm needs more than one value.
        ("imagenet/deit_ti_strong", ["--size", "225x225"]),
        ("cityscapes/pspnet_contti", ["--size", "64x64", "--batch", "1"]),
        # Images are not resized.
        ("fcos_contti", ["INPUT.MIN_SIZE_TEST", "0"]),
        # Mixup needs pairs.
        ("imagenet/contti_strong", ["--size", "64x64", "--batch", "3"]),
        ("faster_rcnn_contti", ["--size", "64x64", "MODEL.META_ARCHITECTURE", "ProposalNetwork"]),
    ],
)
def test_what_a_model_does_not_take_is_one_line(name, argv, capsys):
    assert main(["--config-file", str(CONFIGS / f"{name}.yaml"), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_folder_that_there_is_not(tmp_path, capsys):
    file = tmp_path / "gone" / "costs.json"
    argv = ["--config-file", str(CONFIGS / "fcos_contti.yaml"), "--json", str(file)]
    assert main(argv) == 1
    assert "gone" in capsys.readouterr().err
