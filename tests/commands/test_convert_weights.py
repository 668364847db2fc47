"""tools/convert_weights.py: every form there and back, outputs, heads, foreign files, names."""

import argparse
import hashlib
import json
import pickle
import runpy
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import QUICK, REPOSITORY, SMALL
from oracle import make_oracle
from safetensors import safe_open
from timm.utils import ModelEmaV3

import contnet
from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.convert import EXPORTS
from contnet.checkpoint.key_mapping import (
    convert_resnet_state_dict,
    detectron2_name,
    torchvision_name,
)
from contnet.checkpoint.reading import read_checkpoint
from contnet.checkpoint.reference import run_authors
from contnet.commands import convert_weights as weights
from contnet.config import load_config
from contnet.modeling.backbone import backbone_prefix
from contnet.modeling.build import build_model
from contnet.utils.errors import UserError

CONTNET, RESNET = "faster_rcnn_contti.yaml", "faster_rcnn_r50.yaml"
ALL = {"relative": True, "pre_norm": True, "use_avgdown": True, "qkv_bias": False}


def chosen(mask):
    """The options whose bits are set."""
    return {k: v for i, (k, v) in enumerate(ALL.items()) if mask >> i & 1}


OTHERS = [("contnet_s", {}), ("contnet_s", ALL), ("contnet_m", {}), ("contnet_b", ALL)]
# The smallest network has every combination, or every option alone and all together.
CASES = [*(("contnet_ti", chosen(mask)) for mask in range(16)), *OTHERS]
FEWER_CASES = [*(("contnet_ti", chosen(mask)) for mask in (0, 1, 2, 4, 8, 15)), *OTHERS[1:]]
COUNT = "num_batches_tracked"


def as_file(source, folder):
    """The path of a file, or of one made of what is to be in it."""
    if not isinstance(source, (str, Path)):
        torch.save(source, folder / "source.pth")
        source = folder / "source.pth"
    return str(source)


@pytest.fixture
def convert(tmp_path, capsys):
    """Runs the tool on a file or on what is to be in one; returns its result's path and lines."""

    def run(source, *options, target="result.pth"):
        status = weights.main([as_file(source, tmp_path), str(tmp_path / target), *options])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        lines = captured.out.splitlines()
        return Path(lines[-1]), lines

    return run


@pytest.fixture
def refuse(tmp_path, capsys):
    """Runs the tool on what it must refuse; returns its one line."""

    def run(source, *options, target="result.pth"):
        source = as_file(source, tmp_path)
        before = sorted(tmp_path.rglob("*"))
        assert weights.main([source, str(tmp_path / target), *options]) == 1
        assert sorted(tmp_path.rglob("*")) == before
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return run


def load(path):
    """Tensors and metadata of a result."""
    content = read_checkpoint(str(path))
    return content["model"], content["contnet"]


def rebuilt(path):
    """The network that a result of ours says it is, with its weights."""
    tensors, metadata = load(path)
    model = contnet.create_model(metadata["variant"], **metadata["options"])
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def assert_same(a, b):
    """Same names but for the norms' counts, and bit-equal tensors."""
    a, b = ({k: v for k, v in x.items() if not k.endswith(COUNT)} for x in (a, b))
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@lru_cache(maxsize=4)
def _ours(name, options):
    return contnet.convert_state_dict(make_oracle(name, **dict(options)).state_dict())[0]


def ours(name="contnet_ti", **options):
    """A state dict of ours in which no tensor is a constant; its tensors are not to be changed."""
    return dict(_ours(name, tuple(options.items())))


def flag(options):
    """What the command line must be told."""
    return ["--pre-norm"] if options.get("pre_norm") else []


def shaken(model):
    """A network whose norms are not the identity, and whose outputs stay small."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
            torch.nn.init.uniform_(module.weight, 0.3, 0.5)
            torch.nn.init.uniform_(module.bias, -0.1, 0.1)
    return model.eval()


# --- the authors' ConTNet ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@torch.no_grad()
def test_the_authors_logits(convert, name, options):
    theirs = make_oracle(name, num_classes=10, **options)
    released = {f"module.{k}": v for k, v in theirs.state_dict().items()}
    path, lines = convert({"model": released, "epoch": 199}, *flag(options))
    _, metadata = load(path)
    assert metadata["variant"] == name
    given = {"relative": False, "pre_norm": False, "use_avgdown": False, "qkv_bias": True}
    given |= {"num_classes": 10, "in_chans": 3, **options}
    assert metadata["options"] == given
    image = torch.randn(1, 3, 97, 131)
    torch.testing.assert_close(rebuilt(path)(image), theirs(image), rtol=0, atol=1e-4)
    assert "mapped   module.fc.bias -> head.bias" in lines


@pytest.mark.parametrize("relative", [False, True])
@torch.no_grad()
def test_weights_work_at_every_size(convert, relative):
    theirs = make_oracle("contnet_s", relative=relative)
    model = rebuilt(convert(theirs.state_dict())[0])
    for size in ((32, 32), (97, 131), (160, 192), (224, 224), (288, 320)):
        image = torch.randn(1, 3, *size)
        torch.testing.assert_close(model(image), theirs(image), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mask", range(0, 16, 3))
@torch.no_grad()
def test_what_check_runs_is_the_authors_network(mask):
    """The tool's own run of their tensors, beside the tests' one."""
    options = chosen(mask)
    theirs = make_oracle("contnet_ti", **options)
    for size in ((224, 224), (97, 131)):
        image = torch.randn(1, 3, *size)
        features, logits = run_authors(theirs.state_dict(), image, options.get("pre_norm", False))
        torch.testing.assert_close(logits, theirs(image), rtol=0, atol=1e-4)
        torch.testing.assert_close(features, theirs.features(image)["res5"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), FEWER_CASES, ids=str)
def test_to_ours_and_back_is_exact(convert, name, options):
    theirs = dict(make_oracle(name, **options).state_dict())
    path, _ = convert(theirs, *flag(options), target="a.safetensors")
    back, _ = convert(path, "--to", "authors")
    tensors, metadata = load(back)
    assert tensors.keys() == theirs.keys()
    assert_same(tensors, theirs)
    assert all(torch.equal(value, tensors[k]) for k, value in theirs.items())
    # The first result says pre_norm, which the second was not told.
    assert metadata["options"]["pre_norm"] == options.get("pre_norm", False)
    assert metadata["form"] == "authors"
    again, _ = convert(back, "--to", "timm", target="a.safetensors")
    assert_same(load(again)[0], load(path)[0])


WRAPPINGS = {
    "bare": lambda state: state,
    "bare module": lambda state: {f"module.{k}": v for k, v in state.items()},
    "model": lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {}}},
    "state_dict": lambda state: {"state_dict": state, "arch": "contnet"},
    "compiled": lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    "numpy's numbers": lambda state: {"model": state, "best_acc1": np.float64(7), "n": np.int64(3)},
    "in the bare dict": lambda state: {**state, "epoch": 3},
}


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_known_shapes_of_a_checkpoint(convert, wrapping, relative):
    state = dict(make_oracle("contnet_ti", relative=relative).state_dict())
    path, _ = convert(WRAPPINGS[wrapping](state))
    assert_same(load(path)[0], contnet.convert_state_dict(state)[0])


def test_leftovers_and_buffers_are_told_and_left(convert):
    state = dict(make_oracle("contnet_ti", relative=True).state_dict())
    state["aux.weight"] = torch.zeros(3)
    path, lines = convert(state)
    assert "dropped  aux.weight (no part of the network)" in lines
    index = "layer1.ConTBlock0.ste1.attn.relative_position_index"
    assert f"dropped  {index} (the network computes it)" in lines
    assert len([line for line in lines if line.startswith("mapped")]) == len(load(path)[0])
    rebuilt(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_half(convert, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in ours().items()}
    path, _ = convert(state, "--check", "--to", "authors", target="a.safetensors")
    back = load(convert(path, "--check")[0])[0]
    assert_same(back, state)
    assert back["stem.weight"].dtype == dtype


def test_without_a_head_it_is_told_missing(convert):
    state = {k: v for k, v in ours().items() if not k.startswith("head.")}
    path, lines = convert(state, "--check")
    assert "missing  head.weight" in lines
    assert rebuilt(path).num_classes == 0


# --- our own runs --------------------------------------------------------------------------------


class Classifier(torch.nn.Module):
    """As our classifier keeps its network."""

    def __init__(self, network):
        super().__init__()
        self.network = network


def make_detector(leaf, *options):
    """A small model with random weights."""
    small = QUICK if leaf.startswith("imagenet/") else SMALL
    return build_model(load_config(str(REPOSITORY / "configs" / leaf), [*small, *options]))


def save_run(model, folder, ema=False):
    """A checkpoint as a run leaves it; the average's weights are twice the last ones."""
    extras = {"ema": ModelEmaV3(model)} if ema else {}
    if ema:
        with torch.no_grad():
            for value in extras["ema"].module.parameters():
                value.mul_(2)
    trainer = {"iteration": 3, "classes": list("abcdefg")}
    Checkpointer(model, str(folder), **extras).save("model_final", trainer=trainer)
    return folder / "model_final.pth"


def test_a_classifier_of_ours(convert, tmp_path):
    network = contnet.create_model("contnet_s", num_classes=7, relative=True)
    network.load_state_dict(ours("contnet_s", relative=True, num_classes=7))
    path, lines = convert(save_run(Classifier(network), tmp_path), "--check")
    assert_same(load(path)[0], network.state_dict())
    assert "mapped   network.head.bias -> head.bias" in lines
    assert load(path)[1]["options"]["num_classes"] == 7
    assert load(path)[1]["classes"] == list("abcdefg")


@pytest.mark.parametrize("option", ["", "--last"])
def test_averaged_weights_are_taken_unless_told_otherwise(convert, tmp_path, option):
    network = contnet.create_model("contnet_ti", num_classes=7)
    file = save_run(Classifier(network), tmp_path, ema=True)
    path, lines = convert(file, *option.split())
    factor = 1 if option else 2
    expected = dict(network.named_parameters())
    found = {k: v for k, v in load(path)[0].items() if k in expected}
    assert_same(found, {k: v * factor for k, v in expected.items()})
    key = "'model'" if option else "'ema'"
    assert any(line.startswith("source") and f"its {key}, left behind: " in line for line in lines)
    assert load(path)[1]["source_key"] == key.strip("'")


@pytest.mark.parametrize("leaf", [CONTNET, "cityscapes/pspnet_contti.yaml"])
def test_a_detectors_contnet(convert, tmp_path, leaf):
    options = [] if leaf == CONTNET else ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice"]
    model = make_detector(leaf, *options)
    path, lines = convert(save_run(model, tmp_path), "--check")
    prefix = backbone_prefix(model)
    expected = {
        k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)
    }
    assert_same(load(path)[0], expected)
    assert "classes" not in load(path)[1]  # they are not its backbone's
    assert any(line.startswith("dropped") and "no part of the network" in line for line in lines)


def test_a_detectors_resnet_becomes_torchvisions(convert, tmp_path):
    model = make_detector(RESNET)
    path, _ = convert(save_run(model, tmp_path), "--to", "timm", "--check")
    theirs = torchvision.models.resnet50()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(load(path)[0], strict=True)
    value = model.backbone.bottom_up.res4[2].conv2.norm.running_var
    assert torch.equal(theirs.layer3[2].bn2.running_var, value)


def test_a_detector_with_group_norm_says_what_to_do(refuse, tmp_path):
    file = save_run(make_detector(CONTNET, "MODEL.CONTNET.NORM", "GN"), tmp_path)
    assert "GroupNorm" in refuse(file)


# --- ResNets -------------------------------------------------------------------------------------


# Both kinds of blocks.
@pytest.mark.parametrize(("name", "target"), [("resnet18", "r.safetensors"), ("resnet50", "r.pth")])
def test_resnets_there_and_back(convert, name, target):
    theirs = shaken(timm.create_model(name, num_classes=9))
    path, lines = convert(theirs.state_dict(), "--check", target=target)
    tensors, metadata = load(path)
    assert (metadata["variant"], metadata["options"]) == (name, {"num_classes": 9})
    assert "stem.conv1.norm.weight" in tensors
    assert len([line for line in lines if line.startswith("check")]) >= 2
    back, _ = convert(path, "--to", "timm", "--check", target=target)
    assert_same(load(back)[0], theirs.state_dict())
    timm.create_model(name, num_classes=9).load_state_dict(load(back)[0], strict=True)


@pytest.mark.parametrize("name", ["resnet34", "resnet101"])
def test_resnets_of_other_depths(convert, name):
    theirs = shaken(timm.create_model(name, num_classes=9))
    path, _ = convert(theirs.state_dict())
    assert load(path)[1]["variant"] == name
    back, _ = convert(path, "--to", "timm")
    assert_same(load(back)[0], theirs.state_dict())


def test_torchvisions_resnet(convert):
    theirs = shaken(torchvision.models.resnet50())
    path, _ = convert(theirs.state_dict(), "--check")
    assert_same(load(path)[0], convert_resnet_state_dict(theirs.state_dict()))


def test_the_average_of_torchvisions_scripts(convert):
    last, average = (torchvision.models.resnet18(num_classes=3).state_dict() for _ in range(2))
    average_file = {f"module.{k}": v for k, v in average.items()}
    content = {"model": last, "model_ema": {"n_averaged": torch.tensor(5), **average_file}}
    path, lines = convert(content, "--to", "timm")
    assert_same(load(path)[0], average)
    assert any(line.startswith("dropped  n_averaged") for line in lines)


def test_names_of_resnets_are_one_to_one():
    for name in ("resnet18", "resnet34", "resnet50", "resnet101"):
        names = [k for k in timm.create_model(name).state_dict() if not k.endswith(COUNT)]
        assert [torchvision_name(detectron2_name(k)) for k in names] == names
        assert len({detectron2_name(k) for k in names}) == len(names)


OTHER_RESNETS = ("resnet50d", "seresnet50", "resnext50_32x4d", "wide_resnet50_2", "resnet26")


@pytest.mark.parametrize("name", OTHER_RESNETS)
def test_other_resnets_are_refused(refuse, name):
    with torch.device("meta"):
        shapes = timm.create_model(name).state_dict()
    error = refuse({k: torch.zeros(v.shape) for k, v in shapes.items()})
    assert "resnet" in error.lower()


# --- into detectors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "target"), [("keep", "w.pth"), ("drop", "w.safetensors"), ("5", "w.safetensors")]
)
@pytest.mark.parametrize("leaf", [CONTNET, RESNET])
def test_results_load_into_detectors(convert, caplog, leaf, head, target):
    if leaf == CONTNET:
        source = ours()
        expected = source
    else:
        source = shaken(timm.create_model("resnet50")).state_dict()
        expected = convert_resnet_state_dict(source)
    path, _ = convert(source, "--head", head, target=target)
    model = make_detector(leaf)
    with caplog.at_level("INFO", logger="fvcore.common.checkpoint"):
        Checkpointer(model).load_backbone(str(path))
    said = [r.getMessage() for r in caplog.records]
    assert any("tensors of the backbone came from the file" in line for line in said)
    assert not any("head." in line or "linear." in line for line in said if "not used" in line)
    prefix, state = backbone_prefix(model), model.state_dict()
    for name, value in expected.items():
        if not name.endswith(COUNT) and not name.startswith(("head.", "linear.")):
            assert torch.equal(state[prefix + name], value), name


def test_a_safetensors_file_of_another_variant_is_refused_by_training(convert):
    path, _ = convert(ours("contnet_s"), target="s.safetensors")
    with pytest.raises(UserError, match="have another shape"):
        Checkpointer(make_detector(CONTNET)).load_backbone(str(path))


@pytest.mark.parametrize("leaf", [CONTNET, "imagenet/contti.yaml"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_pre_norm_that_the_file_tells_must_be_the_configs(convert, leaf, suffix):
    path = convert(ours(pre_norm=True), "--pre-norm", target=f"a.{suffix}")[0]
    with pytest.raises(UserError, match="has pre_norm True: set"):
        Checkpointer(make_detector(leaf)).load_backbone(str(path))
    Checkpointer(make_detector(leaf, "MODEL.CONTNET.PRE_NORM", "True")).load_backbone(str(path))


@pytest.mark.parametrize("content", [b"", b"These are no weights.\n" * 9, b"\x10" + bytes(40)])
def test_training_refuses_a_file_that_is_no_safetensors(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"w\.safetensors cannot be read"):
        Checkpointer(make_detector(CONTNET)).load_backbone(str(path))


# --- heads ---------------------------------------------------------------------------------------

HEAD_NAMES = {"contnet_ti": "head", "resnet18": "linear"}


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_heads(convert, name):
    whole = timm.create_model(name, num_classes=11).state_dict()
    kept, dropped, new = (load(convert(whole, "--head", head)[0]) for head in ("keep", "drop", "3"))
    head = HEAD_NAMES[name]
    assert kept[0][f"{head}.weight"].shape[0] == 11
    assert f"{head}.weight" not in dropped[0]
    assert new[0][f"{head}.weight"].shape == (3, kept[0][f"{head}.weight"].shape[1])
    assert new[0][f"{head}.bias"].shape == (3,)
    assert 0.005 < new[0][f"{head}.weight"].std() < 0.05
    assert [m["options"]["num_classes"] for _, m in (kept, dropped, new)] == [11, 0, 3]
    for tensors, _ in (dropped, new):
        rest = {k: v for k, v in tensors.items() if not k.startswith(head)}
        assert_same(rest, {k: v for k, v in kept[0].items() if not k.startswith(head)})


def test_a_new_head_is_always_the_same(convert):
    first = load(convert(ours(), "--head", "3")[0])[0]
    source = ours()
    state = torch.get_rng_state()
    assert_same(load(convert(source, "--head", "3")[0])[0], first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("head", ["0", "-1", "some", "1.5"])
def test_other_heads_are_refused(tmp_path, head):
    with pytest.raises(SystemExit):
        weights.main(["a.pth", str(tmp_path / "b.pth"), "--head", head])


@pytest.mark.parametrize("head", ["drop", "4"])
def test_check_with_another_head_compares_the_last_map(convert, head):
    _, lines = convert(ours(), "--head", head, "--check", "--to", "authors")
    assert all("last map at" in line for line in lines if line.startswith("check"))


# --- the written file ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_name_has_the_files_hash_and_the_file_says_what_it_is(convert, tmp_path, suffix):
    state = ours(num_classes=5)
    path, _ = convert(state, target=f"contti{suffix}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"contti-{digest[:8]}{suffix}"
    metadata = load(path)[1]
    source = tmp_path / "source.pth"
    assert metadata["source"] == "source.pth"
    assert metadata["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert metadata["contnet_version"] == contnet.__version__
    assert metadata["variant"] == "contnet_ti"
    assert metadata["options"]["num_classes"] == 5
    if suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["contnet"]) == metadata
    again, _ = convert(state, target=f"contti{suffix}")
    assert again == path
    assert not list(tmp_path.glob("*.tmp"))


def test_slices_of_a_shared_storage_can_be_saved(convert):
    state = ours()
    name = "stages.0.0.encoders.0.attn.qkv.weight"
    state[name] = torch.cat([state[name].T, torch.zeros(state[name].T.shape)], 0)[:48].T
    path, _ = convert(state, "--check", target="a.safetensors")
    assert_same(load(path)[0], state)
    assert path.stat().st_size < 2 * sum(v.nbytes for v in state.values())


def test_the_script(tmp_path, monkeypatch, capsys):
    torch.save(make_oracle("contnet_ti", num_classes=3).state_dict(), tmp_path / "theirs.pth")
    script = str(REPOSITORY / "tools" / "convert_weights.py")
    files = [str(tmp_path / "theirs.pth"), str(tmp_path / "ours.safetensors")]
    command = [sys.executable, script, *files, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert Path(done.stdout.splitlines()[-1]).is_file()
    monkeypatch.setattr("sys.argv", [script, files[1], files[1]])
    with pytest.raises(SystemExit, match=r"^1$"):
        runpy.run_path(script, run_name="__main__")
    assert capsys.readouterr().err.startswith(f"error: {files[1]} is not a file")


# --- what must be refused ------------------------------------------------------------------------


def exchange(first, second):
    """Gives two tensors each other's values, as a slip in a table of names would."""

    def wrong(export):
        def make(state):
            state = dict(export(state))
            shapes = state[first].shape, state[second].shape
            values = state[second].reshape(shapes[0]), state[first].reshape(shapes[1])
            state[first], state[second] = values
            return state

        return make

    return wrong


SLIPS = {
    "norms": ("contnet", "stages.0.0.encoders.0.{}", "norm1.weight", "norm2.weight"),
    "tables": ("authors", "layer4.ConTBlock0.ste2.{}", "pe.0", "pe.1"),
    "encoders": ("contnet", "stages.3.0.{}", "encoders.0.attn.proj.bias", "encoders.1.norm2.bias"),
}


@pytest.mark.parametrize("target", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("slip", SLIPS)
def test_check_finds_a_wrong_result(refuse, monkeypatch, slip, target):
    form, place, *names = SLIPS[slip]
    wrong = exchange(*(place.format(name) for name in names))
    monkeypatch.setitem(EXPORTS, form, wrong(EXPORTS[form]))
    state = make_oracle("contnet_ti").state_dict() if form == "contnet" else ours()
    to = "authors" if form == "authors" else "detectron2"
    assert "source and result differ by" in refuse(state, "--check", "--to", to, target=target)


class Code:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


FILES = {
    "a VGG": lambda p: torch.save({k: torch.zeros(v.shape) for k, v in vgg().items()}, p),
    "text": lambda p: p.write_text("These are no weights.\n" * 9),
    "empty": lambda p: p.write_bytes(b""),
    "cut short": lambda p: (torch.save(ours(), p), p.write_bytes(p.read_bytes()[:100_000])),
    "code": lambda p: torch.save({"model": Code(p.with_name("ran"))}, p),
    "bare code": lambda p: p.write_bytes(pickle.dumps(Code(p.with_name("ran")))),
    "a list": lambda p: torch.save([torch.zeros(1)], p),
    "nothing": lambda p: torch.save({}, p),
    "no tensors": lambda p: torch.save({"model": {"a": 1}}, p),
    "another variant's tensor": lambda p: torch.save(
        {**ours(), "stages.1.0.conv.weight": torch.zeros(3, 3)}, p
    ),
    "one missing": lambda p: torch.save(
        {k: v for k, v in ours().items() if k != "stages.1.0.conv.weight"}, p
    ),
    "half a head": lambda p: torch.save({k: v for k, v in ours().items() if k != "head.bias"}, p),
    "not finite": lambda p: torch.save({**ours(), "head.bias": torch.full((1000,), torch.nan)}, p),
    "quantised": lambda p: torch.save({k: v.char() for k, v in ours().items()}, p),
    "two networks": lambda p: torch.save(
        {f"{side}.{k}": v for k, v in ours().items() for side in ("student", "teacher")}, p
    ),
    "the same twice": lambda p: torch.save({**ours(), "module.stem.weight": torch.zeros(1)}, p),
    "a DeiT": lambda p: torch.save(
        {"model": {f"network.{k}": v for k, v in deit().items()}, "iteration": 3}, p
    ),
}


def vgg():
    with torch.device("meta"):
        return torchvision.models.vgg11().state_dict()


def deit():
    return timm.create_model("deit_tiny_patch16_224").state_dict()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@pytest.mark.parametrize("kind", FILES)
def test_foreign_files_are_one_line_and_nothing_is_written(refuse, tmp_path, kind, suffix):
    path = tmp_path / f"source{suffix}"
    FILES[kind](path)
    assert str(path) in refuse(path)
    assert not (tmp_path / "ran").exists()


NAMED = {
    "a VGG": "features.0.weight",
    "one missing": "stages.1.0.conv.weight",
    "half a head": "head.bias",
    "not finite": "head.bias is not finite",
    "quantised": "stem.weight holds torch.int8: it is quantised",
    "two networks": "several networks (student.stem.weight, teacher.stem.weight)",
    "another variant's tensor": "stages.1.0.conv.weight has shape (3, 3)",
    "code": "could run code",
}


@pytest.mark.parametrize("kind", NAMED)
def test_a_refusal_names_what_is_wrong(refuse, tmp_path, kind):
    FILES[kind](tmp_path / "source.pth")
    assert NAMED[kind] in refuse(tmp_path / "source.pth")


def test_a_checkpoint_with_its_command_line_says_what_to_do(refuse):
    content = {"model": ours(), "args": argparse.Namespace(lr=0.1)}
    error = refuse(content)
    assert "(argparse.Namespace)" in error
    assert "weights_only=False" in error


def test_numbers_are_all_that_numpy_may_bring(refuse, tmp_path):
    for value in (np.zeros(3), np.array(["a"]), np.datetime64("2026-01-01")):
        assert "numpy" in refuse({"model": ours(), "best": value})


@pytest.mark.parametrize(
    ("options", "target", "said"),
    [
        ([], "result.bin", "must end in .pth or .safetensors"),
        ([], "nowhere/result.pth", "there is no folder"),
        (["--to", "authors"], "result.pth", "--to authors is for ConTNets"),
        (["--pre-norm"], "result.pth", "--pre-norm is an option of ConTNet"),
    ],
)
def test_mistakes_on_the_command_line(refuse, options, target, said):
    state = timm.create_model("resnet18").state_dict()
    assert said in refuse(state, *options, target=target)


def test_a_file_that_is_not_there(refuse, tmp_path):
    assert "is not a file" in refuse(tmp_path / "absent.pth")
    assert "is not a file" in refuse(tmp_path)
