"""Tests that weights load completely or not at all, and that other files are refused."""

import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import REPOSITORY, SMALL
from oracle import make_oracle

import contnet
from contnet.checkpoint.checkpointer import Checkpointer
from contnet.config import load_config
from contnet.modeling.backbone import backbone_prefix
from contnet.modeling.build import build_model
from contnet.utils.errors import UserError

CONTNET = "faster_rcnn_contti.yaml"
RESNET = "faster_rcnn_r50.yaml"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def detector(*options, leaf=CONTNET):
    """Builds a small detector with random weights, and its config."""
    cfg = load_config(str(REPOSITORY / "configs" / leaf), [*SMALL, *options])
    return build_model(cfg)


@pytest.fixture
def lines(caplog):
    """Returns the log lines of the checkpointer so far."""
    with caplog.at_level("INFO"):
        yield lambda: [record.getMessage() for record in caplog.records]


def classifier(variant="contnet_ti", **options):
    """Builds a classifier in which no tensor is constant."""
    theirs = make_oracle(variant, **options)
    return contnet.convert_state_dict(theirs.state_dict())[0]


def saved(tmp_path, content, name="weights.pth"):
    """Saves a file with the given content."""
    torch.save(content, tmp_path / name)
    return str(tmp_path / name)


def load(model, file, **options):
    """Loads the backbone as in training."""
    Checkpointer(model, **options).load_backbone(file)


def backbone_of(model):
    """Returns the tensors of the bottom-up network by its own names."""
    prefix = backbone_prefix(model)
    state = model.state_dict()
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def assert_backbone(model, expected):
    """Checks that every tensor equals the expected one bit for bit, and differed before."""
    found = backbone_of(model)
    names = {name for name in expected if not name.startswith("head.")}
    counts = {name for name in names if name.endswith("num_batches_tracked")}
    assert set(found) in (names, names - counts)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def all_of(model):
    """Returns the log line that nothing is missing."""
    tensors = [n for n in backbone_of(model) if not n.endswith("num_batches_tracked")]
    return f"{len(tensors)} of the {len(tensors)} tensors of the backbone came from the file"


# --- what fits -----------------------------------------------------------------------------------

VARIANTS = {
    "FrozenBN": ((), {}),
    "BN": (("MODEL.CONTNET.NORM", "BN"), {}),
    "frozen stages": (("MODEL.CONTNET.NORM", "BN", "MODEL.CONTNET.FREEZE_AT", "2"), {}),
    "relative": (("MODEL.CONTNET.RELATIVE", "True"), {"relative": True}),
}


@pytest.mark.parametrize("setting", VARIANTS)
def test_our_classifier_gives_every_tensor_of_the_backbone(tmp_path, lines, setting):
    options, network = VARIANTS[setting]
    model, state = detector(*options), classifier(**network)
    load(model, saved(tmp_path, state))
    assert_backbone(model, state)
    assert all_of(model) in lines()


def noise(state):
    """Returns other weights of the same shapes."""
    return {name: torch.randn(value.shape) for name, value in state.items()}


FORMS = {
    "bare": dict,
    "model": lambda state: {"model": state},
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {}},
    "beside its average": lambda state: {"state_dict": state, "state_dict_ema": noise(state)},
    "an average alone": lambda state: {"model_ema": state, "epoch": 3},
    "compiled": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_create_models_own_state_dict(tmp_path, lines, form):
    network = contnet.create_model("contnet_ti")
    model = detector()
    load(model, saved(tmp_path, FORMS[form](network.state_dict())))
    assert_backbone(model, network.state_dict())
    assert all_of(model) in lines()
    assert any("EMA weights" in line for line in lines()) == ("average" in form)


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_the_authors_checkpoint(tmp_path, lines, key):
    theirs = make_oracle("contnet_ti", use_avgdown=True, qkv_bias=False).state_dict()
    module = {f"module.{name}": value for name, value in theirs.items()}
    content = {key: module, "epoch": 199, "best_acc1": torch.tensor(77.6), "optimizer": {}}
    model = detector("MODEL.CONTNET.USE_AVGDOWN", "True", "MODEL.CONTNET.QKV_BIAS", "False")
    load(model, saved(tmp_path, content))
    assert_backbone(model, contnet.convert_state_dict(module)[0])
    assert all_of(model) in lines()


@pytest.mark.parametrize("leaf", [CONTNET, RESNET])
def test_a_detector_of_ours(tmp_path, lines, leaf):
    source, model = detector(leaf=leaf), detector(leaf=leaf)
    Checkpointer(source, str(tmp_path)).save("model_final")
    load(model, str(tmp_path / "model_final.pth"))
    assert_backbone(model, backbone_of(source))
    assert all_of(model) in lines()


def test_a_detector_for_other_classes_gives_its_backbone(tmp_path, lines):
    source, model = detector(), detector("MODEL.ROI_HEADS.NUM_CLASSES", "6")
    Checkpointer(source, str(tmp_path)).save("model_final")
    load(model, str(tmp_path / "model_final.pth"))
    assert_backbone(model, backbone_of(source))
    assert all_of(model) in lines()


def test_a_shorter_network_needs_only_its_own_tensors(tmp_path, lines):
    options = {
        "MODEL.META_ARCHITECTURE": "RetinaNet",
        "MODEL.BACKBONE.NAME": "build_contnet_backbone",
        "MODEL.CONTNET.OUT_FEATURES": "('res3',)",
        "MODEL.RETINANET.IN_FEATURES": "('res3',)",
        "MODEL.ANCHOR_GENERATOR.SIZES": "[[32]]",
    }
    options = [word for pair in options.items() for word in pair]
    model, state = detector(*options), classifier()
    load(model, saved(tmp_path, state))
    assert all_of(model) in lines()
    for name, value in backbone_of(model).items():
        assert torch.equal(value, state[name]), name


def test_group_norm_has_no_use_for_running_statistics(tmp_path, lines):
    """GN has weights and biases of the same names, but the means and variances are unused."""
    model, state = detector("MODEL.CONTNET.NORM", "GN"), classifier()
    load(model, saved(tmp_path, state))
    assert all_of(model) in lines()
    assert_backbone(model, {k: v for k, v in state.items() if not k.endswith(STATISTICS)})


def test_a_backbone_of_detectron2s_model_zoo(tmp_path, lines):
    """The file has arrays in a pickle with the network's own names, which are matched by ending."""
    source, model = detector(leaf=RESNET), detector(leaf=RESNET)
    arrays = {name: value.numpy() for name, value in backbone_of(source).items()}
    content = {"model": arrays, "__author__": "us", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    load(model, str(tmp_path / "R-50.pkl"))
    assert_backbone(model, backbone_of(source))
    assert all_of(model) in lines()


RESNETS = {
    "torchvision's": (torchvision.models.resnet50, RESNET, ()),
    "timm's": (partial(timm.create_model, "resnet50"), RESNET, ("MODEL.RESNETS.NORM", "BN")),
    "dilated": (
        torchvision.models.resnet50,
        "cityscapes/pspnet_r50.yaml",
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice"),
    ),
    "basic blocks": (
        partial(timm.create_model, "resnet18"),
        RESNET,
        ("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    ),
}


@pytest.mark.parametrize(
    ("source", "form"), [*zip(RESNETS, ["bare", "model"] * 2, strict=True)], ids=str
)
def test_resnets_of_torchvision_and_timm(tmp_path, lines, source, form):
    """They provide every tensor, and the last feature map is the same."""
    make, leaf, options = RESNETS[source]
    theirs = make().eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
            torch.nn.init.uniform_(module.weight, 0.4, 0.6)
    model = detector(*options, leaf=leaf).eval()
    load(model, saved(tmp_path, FORMS[form](theirs.state_dict())))
    assert all_of(model) in lines()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        x = theirs.maxpool(torch.relu(theirs.bn1(theirs.conv1(image))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
        found = model.get_submodule(backbone_prefix(model)[:-1])(image)["res5"]
    step = 32 // (8 if "pspnet" in leaf else 32)
    torch.testing.assert_close(found[..., ::step, ::step], expected, rtol=1e-4, atol=1e-4)


# --- what does not -------------------------------------------------------------------------------


def without_one(tensors):
    """Returns a state dict without one tensor."""
    return {k: v for k, v in tensors.items() if k != "stages.1.0.encoders.0.mlp.fc1.weight"}


MISFITS = {
    "other variant": (lambda: classifier("contnet_s"), CONTNET, "have another shape (backbone."),
    "relative": (lambda: classifier(relative=True), CONTNET, "row_table"),
    "no bias": (lambda: classifier(qkv_bias=False), CONTNET, "qkv.bias"),
    "one missing": (
        lambda: without_one(classifier()),
        CONTNET,
        "; 1 are not in it (backbone.bottom_up.stages.1.0.encoders.0.mlp.fc1.weight)",
    ),
    "other network": (lambda: classifier(), RESNET, "0 of the"),
    "a ResNet": (lambda: torchvision.models.resnet50().state_dict(), CONTNET, "0 of the 137"),
    "a deeper ResNet": (lambda: torchvision.models.resnet18().state_dict(), RESNET, "not in it"),
    "nothing": (lambda: {"a": torch.zeros(1)}, CONTNET, "0 of the 137 tensors"),
    "no statistics": (
        lambda: {k: v for k, v in classifier().items() if not k.endswith(STATISTICS)},
        CONTNET,
        "8 are not in it (backbone.bottom_up.stages.0.0.norm.running_mean",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_that_do_not_fit_are_an_error_that_names_tensors(tmp_path, misfit):
    content, leaf, said = MISFITS[misfit]
    with pytest.raises(UserError) as error:
        load(detector(leaf=leaf), saved(tmp_path, content()))
    line = str(error.value)
    assert said in line
    assert "backbone.bottom_up." in line
    assert "MODEL.ALLOW_MISSING_WEIGHTS" in line
    assert f"python tools/convert_weights.py {tmp_path}/weights.pth NEW.pth" in line
    assert "\n" not in line


def test_the_authors_file_of_a_network_that_is_none_of_theirs(tmp_path):
    content = make_oracle("contnet_ti").state_dict()
    content = {name: value for name, value in content.items() if "layer4" not in name}
    with pytest.raises(UserError, match="no ConTNet variant"):
        load(detector(), saved(tmp_path, content))


def test_a_resnet_with_another_stem(tmp_path):
    file = saved(tmp_path, timm.create_model("resnet50d").state_dict())
    with pytest.raises(UserError, match=r"weights\.pth: .* no conv1\.weight of 7x7"):
        load(detector(leaf=RESNET), file)


def test_missing_weights_are_accepted_where_a_key_allows_it(tmp_path, lines):
    model, state = detector(), without_one(classifier())
    load(model, saved(tmp_path, state), allow_missing=True)
    (line,) = [line for line in lines() if "tensors of the backbone" in line]
    total = len([n for n in backbone_of(model) if not n.endswith("num_batches_tracked")])
    assert line.startswith(f"{total - 1} of the {total} tensors of the backbone came from the file")
    assert "stages.1.0.encoders.0.mlp.fc1.weight" in line
    found = backbone_of(model)
    assert all(torch.equal(found[name], state[name]) for name in found if name in state)


# --- files that are not checkpoints --------------------------------------------------------------


class Code:
    """Creates a file if it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


class Command:
    """Runs a command if it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def cut_short(path):
    whole = saved(path.parent, classifier(), "whole.pth")
    path.write_bytes(Path(whole).read_bytes()[:100_000])


FILES = {
    "cut short": cut_short,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("These are no weights.\n" * 9),
    "picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "code": lambda path: torch.save({"model": Code(path.with_name("ran"))}, path),
    "bare code": lambda path: path.write_bytes(pickle.dumps(Code(path.parent / "ran"))),
    "command": lambda path: torch.save({**classifier(), "a": Command(path.parent / "ran")}, path),
    "numbers for names": lambda path: torch.save(dict(enumerate(classifier().values())), path),
    "not finite": lambda path: torch.save({k: v / 0 for k, v in classifier().items()}, path),
    "quantised": lambda path: torch.save({k: v.char() for k, v in classifier().items()}, path),
    "list": lambda path: torch.save([torch.zeros(1)], path),
    "tensor": lambda path: torch.save(torch.zeros(1), path),
}

SAID = {
    "command": "posix.system",
    "code": "could run code",
    "numbers for names": "contains no weights",
    "not finite": "backbone.bottom_up.stem.weight is not finite",
    "quantised": "backbone.bottom_up.stem.weight is torch.int8",
}


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("kind", FILES)
def test_other_files_are_one_line(tmp_path, kind, suffix):
    path = tmp_path / f"weights{suffix}"
    FILES[kind](path)
    with pytest.raises(UserError) as error:
        load(detector(), str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    if suffix == ".pth":
        assert SAID.get(kind, "") in str(error.value)


def test_a_damaged_head_is_no_matter_of_a_detectors(tmp_path):
    state = classifier()
    state["head.weight"][0, 0] = torch.nan
    load(detector(), saved(tmp_path, state))


@pytest.mark.parametrize("content", [{"model": 3}, {"model": {}}, {}, {"model": {"a": 1}}], ids=str)
def test_checkpoints_without_weights_are_one_line(tmp_path, content):
    with pytest.raises(UserError, match=r"convert_weights.py .*/weights.pth NEW.pth") as error:
        load(detector(), saved(tmp_path, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        ["MODEL.CONTNET.VARIANT", "contnet_s"],
        ["MODEL.FPN.OUT_CHANNELS", "16"],
        ["MODEL.CONTNET.RELATIVE", "True"],
        ["MODEL.ROI_HEADS.NUM_CLASSES", "3"],
    ],
    ids=lambda options: options[0],
)
def test_a_checkpoint_of_another_architecture_is_not_resumed(tmp_path, options):
    checkpointer = Checkpointer(detector(*options), str(tmp_path))
    checkpointer.save("model_0000001")
    other = Checkpointer(detector(), str(tmp_path))
    with pytest.raises(UserError, match="another architecture") as error:
        other.load(other.get_checkpoint_file())
    assert "\n" not in str(error.value)
    # If names differ, more than the classes is different.
    names_differ = options[0] == "MODEL.CONTNET.RELATIVE"
    assert ("or of another number of classes" in str(error.value)) != names_differ
    # Training can continue after that.
    checkpointer.load(checkpointer.get_checkpoint_file())


def test_a_whole_checkpoint_is_not_one_of_a_backbone(tmp_path):
    file = saved(tmp_path, classifier())
    with pytest.raises(UserError, match="tensors of the model"):
        Checkpointer(detector(), allow_missing=True).load(file)


@pytest.mark.parametrize("kind", ["text", "objects", "dates"])
def test_arrays_that_are_no_weights(tmp_path, kind):
    values = {"text": ["a"], "objects": [None], "dates": ["2026-01-01"]}
    kinds = {"text": "U", "objects": "O", "dates": "datetime64[D]"}
    content = {"model": {"a": np.array(values[kind], kinds[kind])}, "__author__": "us"}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="contains no weights") as error:
        load(detector(), str(tmp_path / "w.pkl"))
    assert "\n" not in str(error.value)


def test_a_part_that_is_called_module(tmp_path):
    model = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 2), "other": torch.nn.Linear(2, 2)})
    Checkpointer(model, str(tmp_path)).save("a")
    before = model["module"].weight.clone()
    torch.nn.init.zeros_(model["module"].weight)
    Checkpointer(model).load(str(tmp_path / "a.pth"))
    assert torch.equal(model["module"].weight, before)


def test_a_model_without_backbone_begins_from_nothing(tmp_path):
    file = saved(tmp_path, {"weight": torch.zeros(1, 1)})
    with pytest.raises(UserError, match="has no backbone"):
        load(torch.nn.Linear(1, 1), file)


def test_an_address_that_does_not_answer(tmp_path):
    with pytest.raises(UserError, match="cannot be downloaded"):
        load(detector(), "http://127.0.0.1:9/weights.pth")


def test_last_checkpoint_names_a_file_that_is_gone(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    checkpointer = Checkpointer(torch.nn.Linear(1, 1), str(tmp_path))
    with pytest.raises(UserError, match=r"last_checkpoint names model_0000004\.pth"):
        checkpointer.get_checkpoint_file()
