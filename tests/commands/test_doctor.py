"""Tests the doctor with missing files, wrong options, and names of data sets."""

import shutil

import pytest
from detectron2.data import MetadataCatalog
from drawn_set import _doctor

from contnet.data.findings import SHOWN

pytest_plugins = ["drawn_set"]


def test_examples_are_counted(data, capsys):
    for item in data.content["annotations"][:8]:
        item["category_id"] = 50
    _, lines = _doctor(capsys, *data.options())
    (line,) = [line for line in lines if "does not list" in line]
    assert ": 8 [annotation 1 of image 1; " in line
    assert line.endswith("; ... and 3 more]")
    assert line.count("; annotation") == SHOWN - 1


@pytest.mark.parametrize("gone", ["annotations/instances_val.json", "val"])
def test_missing_parts(data, capsys, gone):
    options = data.options()
    shutil.move(data.root / gone, data.root / "elsewhere")
    status, lines = _doctor(capsys, *options)
    assert status == 1
    (line,) = [line for line in lines if "ERROR" in line]
    assert f"{data.root / gone} does not exist" in line


def test_cut_json(data, capsys):
    options = data.options()
    data.file.write_text(data.file.read_text()[:-50])
    assert "is not valid JSON" in _doctor(capsys, *options)[1][0]
    status, lines = _doctor(capsys, *options, "MODEL.ROI_HEADS.NUM_CLASSES", "4")
    assert status == 1
    assert any("ERROR" in line and "is not valid JSON" in line for line in lines)


def test_config_mistakes_are_one_line(capsys):
    no_sets = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    for options in (["A.B", "1"], no_sets, ["--worker"], ["--workers", "0"]):
        status, lines = _doctor(capsys, *options)
        assert status == 2
        assert len(lines) == 1
        assert lines[0].startswith("error: ")


def test_unknown_names_and_wrong_numbers(data, capsys):
    options = [*data.options(), "DATASETS.TEST", "('vall',)"]
    status, lines = _doctor(capsys, *options)
    assert status == 1
    assert any("it is not registered" in line and "did you mean val" in line for line in lines)
    status, lines = _doctor(capsys, *data.options(), "MODEL.ROI_HEADS.NUM_CLASSES", "80")
    said = "it has 4 classes, but MODEL.ROI_HEADS.NUM_CLASSES is 80: set it to 4"
    assert (status, sum(said in line for line in lines)) == (1, 2)


def test_built_in_names_keep_their_classes(data, capsys, monkeypatch):
    """COCO is replaced by three images with other categories, for which Detectron2 would fail."""
    data.options()
    metadata = MetadataCatalog.get("coco_2017_val")
    monkeypatch.setitem(vars(metadata), "json_file", str(data.file))
    monkeypatch.setitem(vars(metadata), "image_root", str(data.root / "train"))
    options = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "('coco_2017_val',)"]
    status, lines = _doctor(capsys, *options)
    assert status == 1
    assert any("other categories than coco_2017_val" in line for line in lines)
    assert any("NOTE" in line and "COCO has 5000 and 36781" in line for line in lines)
