"""Tests converted weights that models load, and those that they refuse."""

import pytest
import timm
import torch
from conversions import CONTNET, COUNT, RESNET, make_detector, ours, shaken

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.key_mapping import convert_resnet_state_dict
from contnet.modeling.backbone import backbone_prefix
from contnet.utils.errors import UserError

pytest_plugins = ["conversions"]


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
    with caplog.at_level("INFO"):
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


@pytest.mark.parametrize("content", [b"", b"These are no weights.\n" * 9, b"\x10" + bytes(40)])
def test_training_refuses_a_file_that_is_no_safetensors(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"w\.safetensors cannot be read"):
        Checkpointer(make_detector(CONTNET)).load_backbone(str(path))
