"""Tests tools/convert_weights.py: checkpoints of runs, the written file, the command line."""

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from conftest import REPOSITORY
from conversions import CONTNET, RESNET, assert_same, load, make_detector, ours
from oracle import make_oracle
from safetensors import safe_open
from timm.utils import ModelEmaV3

import contnet
from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.metadata import Metadata
from contnet.modeling.backbone import backbone_prefix

pytest_plugins = ["conversions"]


# --- our own runs --------------------------------------------------------------------------------


class Classifier(torch.nn.Module):
    """Has the same structure as our classifier."""

    def __init__(self, network):
        super().__init__()
        self.network = network


def save_run(model, folder, ema=False, **facts):
    """Saves a run's checkpoint, in which the EMA weights are twice the last weights."""
    extras = {"ema": ModelEmaV3(model)} if ema else {}
    if ema:
        with torch.no_grad():
            for value in extras["ema"].module.parameters():
                value.mul_(2)
    metadata = Metadata(**{"network": "contnet_ti", "options": {"pre_norm": False}, **facts})
    Checkpointer(model, str(folder), metadata=metadata, **extras).save("model_final")
    return folder / "model_final.pth"


def test_a_classifier_of_ours(convert, tmp_path):
    network = contnet.create_model("contnet_s", num_classes=7, relative=True)
    network.load_state_dict(ours("contnet_s", relative=True, num_classes=7))
    path, lines = convert(
        save_run(Classifier(network), tmp_path, network="contnet_s", classes=list("abcdefg")),
        "--check",
    )
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
    assert any(line.startswith("source") and f"its {key}, not used: " in line for line in lines)
    assert load(path)[1]["conversion"]["source_key"] == key.strip("'")


@pytest.mark.parametrize("leaf", [CONTNET, "cityscapes/pspnet_contti.yaml"])
def test_a_detectors_contnet(convert, tmp_path, leaf):
    options = [] if leaf == CONTNET else ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice"]
    model = make_detector(leaf, *options)
    path, lines = convert(save_run(model, tmp_path, classes=list("abcdefg")), "--check")
    prefix = backbone_prefix(model)
    expected = {
        k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)
    }
    assert_same(load(path)[0], expected)
    assert load(path)[1]["classes"] is None  # the detector's classes are not the backbone's
    assert any(line.startswith("dropped") and "not part of the network" in line for line in lines)


def test_a_detectors_resnet_becomes_torchvisions(convert, tmp_path):
    model = make_detector(RESNET)
    path, _ = convert(
        save_run(model, tmp_path, network="resnet50", options={}), "--to", "timm", "--check"
    )
    theirs = torchvision.models.resnet50()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(load(path)[0], strict=True)
    value = model.backbone.bottom_up.res4[2].conv2.norm.running_var
    assert torch.equal(theirs.layer3[2].bn2.running_var, value)


def test_a_detector_with_group_norm_says_what_to_do(refuse, tmp_path):
    file = save_run(make_detector(CONTNET, "MODEL.CONTNET.NORM", "GN"), tmp_path)
    assert "GroupNorm" in refuse(file)


# --- the written file ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_name_has_the_files_hash_and_the_file_says_what_it_is(convert, tmp_path, suffix):
    state = ours(num_classes=5)
    path, _ = convert(state, target=f"contti{suffix}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"contti-{digest[:8]}{suffix}"
    metadata = load(path)[1]
    conversion = metadata["conversion"]
    source = tmp_path / "source.pth"
    assert conversion["source"] == "source.pth"
    assert conversion["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert metadata["versions"]["contnet"] == contnet.__version__
    assert metadata["network"] == "contnet_ti"
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
    command = [sys.executable, script, *files, "--check", "--no-pre-norm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert Path(done.stdout.splitlines()[-1]).is_file()
    monkeypatch.setattr("sys.argv", [script, files[1], files[1]])
    with pytest.raises(SystemExit, match=r"^1$"):
        runpy.run_path(script, run_name="__main__")
    assert capsys.readouterr().err.startswith(f"error: {files[1]} is not a file")


# --- what must be refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "target", "said"),
    [
        ([], "result.bin", "must end in .pth or .safetensors"),
        ([], "nowhere/result.pth", "nowhere does not exist"),
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
