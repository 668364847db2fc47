"""Tests tools/export.py: an export computes the same as the model, also without this project."""

import json

import numpy as np
import pytest
import torch
from exports import draw_image, run_example, save_decided
from PIL import Image

import contnet
from contnet.commands.export import main
from contnet.export import checking
from contnet.export.folder import ExportSettings, export_model
from contnet.export.formats import FORMATS, require
from contnet.utils.errors import UserError

CLASSIFIER, SEGMENTER = "imagenet/contti_strong", "cityscapes/pspnet_contti"
DETECTORS = ["retinanet_contti", "fcos_contti", "faster_rcnn_contti", "mask_rcnn_contti"]
NEVER = {"contnet", "detectron2", "fvcore", "timm"}
OTHERS = ("onnx", "torch-export")
HIDDEN = {"onnx": NEVER | {"torch", "torchvision", "onnx"}, "torch-export": NEVER}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Makes the run of a system once."""
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
    """Checks that the example finds the same in an image as the model."""
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
        assert (labels == found["semantic"]).mean() > 0.97  # logits are resized differently
        assert len(np.unique(labels)) > 1
    else:
        names, scores, boxes = printed
        assert len(names) > 2 and names == found["names"]
        assert np.allclose(scores, found["scores"], atol=1e-4)
        assert np.allclose(boxes, found["boxes"], atol=0.02)
        if "masks" in facts["outputs"]:
            masks = np.load(tmp_path / "masks.npy")
            assert masks.shape == found["masks"].shape and masks.any()
            assert (masks == found["masks"]).mean() > 0.999


def every_pair():
    """Yields all systems in all formats; `make test` runs the most different pairs."""
    for name in (CLASSIFIER, SEGMENTER, *DETECTORS):
        for form in FORMATS:
            fast = form == "torchscript" or (name, form) == (CLASSIFIER, "onnx")
            rare = name != CLASSIFIER and (name, form) != ("mask_rcnn_contti", "onnx")
            marks = () if fast else pytest.mark.long if rare else pytest.mark.slow
            yield pytest.param(name, form, marks=marks)


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


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (CLASSIFIER, "torchscript"),
        ("fcos_contti", "torchscript"),
        pytest.param("fcos_contti", "onnx", marks=pytest.mark.long),
        pytest.param(CLASSIFIER, "torch-export", marks=pytest.mark.long),
    ],
)
def test_backbones(name, form, run_of, tmp_path):
    """The batch size is free, even for a detector."""
    folder = tmp_path / "exported"
    assert main([str(run_of(name)), str(folder), "--format", form, "--backbone"]) == 0
    facts, image = facts_of(folder), draw_image(tmp_path / "image.png")
    stages = ["res2", "res3", "res4", "res5"]
    assert facts["outputs"] == (stages if name == CLASSIFIER else ["p3", "p4", "p5", "p6", "p7"])
    assert facts["batch"] == "any" and facts["check"]["largest_difference"] < 1e-4
    printed = run_example(folder, image, HIDDEN.get(form, NEVER), tmp_path)
    assert [name for name, _ in printed] == facts["outputs"]
    assert printed[0][1][0] == 1 and len(printed[0][1]) == 4


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (CLASSIFIER, "torchscript"),
        pytest.param(CLASSIFIER, "onnx", marks=pytest.mark.long),
        pytest.param("retinanet_contti", "torchscript", marks=pytest.mark.slow),
    ],
)
def test_half_precision(name, form, run_of, tmp_path):
    run, folder = run_of(name), tmp_path / "exported"
    assert main([str(run), str(folder), "--format", form, "--dtype", "float16"]) == 0
    facts = facts_of(folder)
    assert 1e-5 < facts["check"]["largest_difference"] < 2e-2
    weights = sum(each.numel() for each in contnet.load_run(run).model.parameters())
    assert 2 * weights < (folder / facts["file"]).stat().st_size < 3 * weights


@pytest.mark.slow
def test_int8_weights(run_of, tmp_path):
    folder = tmp_path / "exported"
    assert main([str(run_of(CLASSIFIER)), str(folder), "--format", "onnx", "--int8"]) == 0
    facts = facts_of(folder)
    assert facts["weights"] == "int8" and facts["check"]["same_top1"] >= 0.95
    assert 1e-4 < facts["check"]["largest_difference"] < 0.1
    assert (folder / "model.onnx").stat().st_size < 14e6  # 22 MB in float32


@pytest.mark.parametrize("form", ["torchscript", pytest.param("onnx", marks=pytest.mark.long)])
def test_images_in_which_nothing_is_found(form, run_of, tmp_path):
    run = run_of("mask_rcnn_contti", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.9999")
    folder = tmp_path / "exported"
    assert main([str(run), str(folder), "--format", form]) == 0
    assert facts_of(folder)["check"]["detections"] == 0
    image = draw_image(tmp_path / "image.png")
    assert run_example(folder, image, NEVER, tmp_path) == [[], [], []]
    assert np.load(tmp_path / "masks.npy").shape == (0, 170, 230)


@pytest.mark.parametrize(
    "form", ["torchscript", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)]
)
def test_a_network_with_one_size(form, run_of, tmp_path):
    """DeiT's table of positions is for images of one size."""
    sizes = ["INPUT.CLASSIFIER.RESIZE_TEST", "224", "INPUT.CLASSIFIER.CROP_TEST", "224"]
    run, folder = run_of("imagenet/deit_ti_strong", *sizes), tmp_path / "exported"
    assert main([str(run), str(folder), "--format", form]) == 0
    facts = facts_of(folder)
    assert facts["size"] == [224, 224] and facts["check"]["sizes"] == [[224, 224]]
    assert facts["batch"] == "any" and facts["check"]["largest_difference"] < 1e-4
    run = FORMATS[form].load(folder / facts["file"])
    assert run(torch.zeros(2, 3, 224, 224))[0].shape == (2, 3)
    with pytest.raises(Exception, match=r"224|196|14"):
        run(torch.zeros(2, 3, 208, 224))


def test_given_images_are_compared(run_of, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        draw_image(images / f"{number}.png", 100 + number, 120)
    command = [str(run_of(CLASSIFIER)), str(tmp_path / "new"), "--format", "torchscript"]
    assert main([*command, "--images", str(images)]) == 0
    assert "check on noise and given images" in capsys.readouterr().out
    assert facts_of(tmp_path / "new")["check"]["batches"] == 8 + 3


def test_without_a_check(run_of, tmp_path, capsys):
    folder = tmp_path / "new"
    command = [str(run_of(CLASSIFIER)), str(folder), "--format", "torchscript", "--no-check"]
    assert main(command) == 0
    assert "check" not in facts_of(folder) and "speed" not in capsys.readouterr().out


def test_an_export_that_differs(run_of, tmp_path, capsys, monkeypatch):
    """Half precision is checked with a tolerance for float32."""
    monkeypatch.setitem(checking.TOLERANCES, "float16", 1e-6)
    folder = tmp_path / "new"
    command = [str(run_of(CLASSIFIER)), str(folder), "--format", "torchscript"]
    assert main([*command, "--dtype", "float16"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert "failed its check" in said.err and "done" not in said.out
    assert facts_of(folder)["check"]["passed"] is False


class Chooses(torch.nn.Module):
    """A model with data-dependent control flow."""

    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


def test_a_model_that_a_format_cannot_carry(run_of, tmp_path):
    predictor = contnet.load_run(run_of(CLASSIFIER))
    predictor.model.network = Chooses()
    with pytest.raises(UserError, match="torch-export cannot write this ImageClassifier") as raised:
        export_model(predictor, tmp_path / "new", ExportSettings("torch-export"))
    assert "\n" not in str(raised.value) and not (tmp_path / "new").exists()


def test_heads_that_are_not_exported(run_of, tmp_path, capsys):
    heads = "MODEL.ROI_HEADS.NAME CascadeROIHeads MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True"
    run, script = run_of("faster_rcnn_contti", *heads.split()), ["--format", "torchscript"]
    assert main([str(run), str(tmp_path / "new"), *script]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "--backbone" in said
    assert not (tmp_path / "new").exists()


def test_a_package_that_is_missing():
    with pytest.raises(UserError, match="--format onnx needs no_such_package: pip install"):
        require("no_such_package", "--format onnx")


def test_mistakes(run_of, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    run, detector = str(run_of(CLASSIFIER)), str(run_of("retinanet_contti"))
    script = ["--format", "torchscript"]
    for status, words in (
        (1, [run, "there", *script]),
        (1, [str(tmp_path / "there"), "new", *script]),
        (2, [run, "new", *script, "--int8"]),
        (2, [detector, "new", "--format", "onnx", "--int8"]),
        (2, [run, "new", "--format", "onnx", "--int8", "--dtype", "float16"]),
        (2, [run, "new", *script, "--images", "absent.png"]),
    ):
        words[1] = str(tmp_path / words[1])
        assert main(words) == status, words
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "new").exists()
