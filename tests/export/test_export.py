"""tools/export.py: the export computes what the model does, also where this is not installed."""

import json

import numpy as np
import pytest
from exports import draw_image, run_example, save_decided
from PIL import Image

import contnet
from contnet.commands.export import main
from contnet.export import checking
from contnet.export.formats import FORMATS

CLASSIFIER, SEGMENTER = "imagenet/contti_strong", "cityscapes/pspnet_contti"
DETECTORS = ["retinanet_contti", "fcos_contti", "faster_rcnn_contti", "mask_rcnn_contti"]
NEVER = {"contnet", "detectron2", "fvcore", "timm"}
HIDDEN = {"onnx": NEVER | {"torch", "torchvision", "onnx"}, "torch-export": NEVER}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """The run of a system, made once."""
    runs = {}

    def get(name, *options):
        key = (name, *options)
        if key not in runs:
            folder = tmp_path_factory.mktemp("runs") / "run"
            runs[key] = save_decided(folder, name, *options)
        return runs[key]

    return get


def facts_of(folder):
    return json.loads((folder / "model.json").read_text())


def assert_example_agrees(run, folder, tmp_path):
    """The example finds in an image what the model does."""
    facts, image = facts_of(folder), draw_image(tmp_path / "image.png")
    lines = (folder / "example.py").read_text().splitlines()
    assert sum(not line.startswith(("import", "from", '"""')) for line in filter(None, lines)) <= 20
    printed = run_example(folder, image, HIDDEN.get(facts["format"], NEVER), tmp_path)
    found = contnet.load_run(run)(image)
    if facts["outputs"] == ["logits"]:
        assert [name for name, _ in printed] == found["names"]
        assert np.allclose([score for _, score in printed], found["scores"], atol=1e-5)
    elif facts["outputs"] == ["semantic"]:
        labels = np.array(Image.open(tmp_path / "labels.png"))
        assert (labels == found["semantic"]).mean() > 0.97  # logits are resized another way
        assert len(np.unique(labels)) > 1
    else:
        names, scores, boxes = printed
        assert len(names) == 5 and names == found["names"]
        assert np.allclose(scores, found["scores"], atol=1e-4)
        assert np.allclose(boxes, found["boxes"], atol=0.02)
        if "masks" in facts["outputs"]:
            masks = np.load(tmp_path / "masks.npy")
            assert masks.shape == found["masks"].shape and masks.any()
            assert (masks == found["masks"]).mean() > 0.999


def every_pair():
    """All systems in all formats; slow, but for TorchScript and the classifier in ONNX."""
    for name in (CLASSIFIER, SEGMENTER, *DETECTORS):
        for form in FORMATS:
            fast = form == "torchscript" or (name, form) == (CLASSIFIER, "onnx")
            yield pytest.param(name, form, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "form"), [*every_pair()])
def test_whole_models(name, form, run_of, tmp_path, capsys):
    folder = tmp_path / "exported"
    assert main([str(run_of(name)), str(folder), "--format", form]) == 0
    check = facts_of(folder)["check"]
    assert check["passed"] and check["largest_difference"] < 1e-4
    assert check["unmatched"] == 0 and (check["detections"] > 20) == (name in DETECTORS)
    assert len(check["sizes"]) > 4
    said = capsys.readouterr()
    assert "Warning" not in said.err and "check on noise and drawn images" in said.out
    assert_example_agrees(run_of(name), folder, tmp_path)
