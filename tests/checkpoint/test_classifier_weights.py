"""Tests weights of our classifiers, timm's and the authors', also loaded into backbones."""

import pytest
import timm
import torch
from classifiers import CLASSES, batch, config, normalised
from conftest import REPOSITORY
from oracle import make_oracle

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.key_mapping import detectron2_name
from contnet.config import load_config
from contnet.modeling.build import build_model
from contnet.utils.errors import UserError


@pytest.fixture
def said(caplog):
    with caplog.at_level("INFO"):
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
    Checkpointer(model).load(str(tmp_path / "a.pth"))
    own = network.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in model.network.state_dict().items())


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_authors_checkpoint_gives_their_logits(tmp_path, wrapped):
    theirs = make_oracle("contnet_ti", num_classes=CLASSES)
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"model": state, "epoch": 3} if wrapped else theirs.state_dict(), tmp_path / "a.pth")
    model = build_model(config()).eval()
    Checkpointer(model).load(str(tmp_path / "a.pth"))
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
    Checkpointer(model).load(str(tmp_path / "a.pth"))
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
        Checkpointer(model).load(str(tmp_path / "a.pth"))


def test_leftovers_and_averages_that_are_not_loaded_are_told(tmp_path, said):
    state = {**make_oracle("contnet_ti", num_classes=CLASSES).state_dict(), "odd": torch.zeros(1)}
    torch.save({"model": state, "model_ema": state}, tmp_path / "a.pth")
    Checkpointer(build_model(config())).load_backbone(str(tmp_path / "a.pth"))
    assert "1 tensors do not belong to a ConTNet and are ignored (odd)" in said()
    assert "also has EMA weights ('model_ema')" in said()


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(timm.create_model("resnet18", num_classes=CLASSES).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="are not in it"):
        Checkpointer(build_model(config(leaf="res50"))).load_backbone(str(tmp_path / "a.pth"))
