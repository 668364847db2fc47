"""Tests untrusted annotation files: the checks report every error, and quickly."""

import gzip
import json
import os
import time
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from drawn_set import LEAF, _doctor

from contnet.commands.doctor import main
from contnet.data.conversion.voc import convert_voc
from contnet.data.conversion.yolo import read_names
from contnet.data.datasets.classes import distinct_class_names
from contnet.data.datasets.image_files import match_names
from contnet.data.findings import ERROR, Findings
from contnet.data.validation.coco import DatasetUse, check_instances
from contnet.data.validation.fixing import fix_content
from contnet.data.validation.masks import is_mask_of
from contnet.utils.errors import UserError

pytest_plugins = ["drawn_set"]

USE = DatasetUse(trained=True, evaluated=True, masks=True, bitmasks=True)
SIDE = 100
TRIANGLE = [1.0, 1.0, 9.0, 1.0, 9.0, 9.0]


def _item(number: int, **fields) -> dict:
    item = {"id": number, "image_id": 1, "category_id": 1, "bbox": [1, 1, 8, 8], "area": 32}
    return {**item, "iscrowd": 0, "segmentation": [TRIANGLE], **fields}


def _content(*items: dict, **fields) -> dict:
    image = {"id": 1, "file_name": "1.jpg", "width": SIDE, "height": SIDE}
    categories = [{"id": 1, "name": "thing"}]
    return {"images": [image], "categories": categories, "annotations": list(items), **fields}


def _errors(content: dict) -> list[str]:
    findings = Findings()
    check_instances(json.loads(json.dumps(content)), USE, findings)
    return findings.lines(ERROR)


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [0.0, 0.02, 0.5, 1.0])
def test_runs_are_those_of_pycocotools(drawn):
    mask = np.random.default_rng(0).random((37, 61)) < drawn
    coded = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = coded["counts"].decode()
    assert is_mask_of({"size": [37, 61], "counts": text}, (61, 37))
    assert not is_mask_of({"size": [37, 61], "counts": text + "1"}, (61, 37))
    assert is_mask_of({"size": [2, 5], "counts": [0.0, 10.0]}, (5, 2))
    assert not is_mask_of({"size": [2, 5], "counts": [0.5, 9.5]}, (5, 2))
    assert not is_mask_of({"size": [37, 61], "counts": text[:-1]}, (61, 37))


WRONG_COUNTS = {
    "nothing": "",
    "cut off": "P",
    "a run without an end": "P" * 20 + "0",
    "2 MB of a run without an end": "o" * 2_000_000 + "0",
    "other letters": "\x00\x7f",
    "no ASCII": "é",
    "negative": [-1, SIDE * SIDE + 1],
    "more than there are": [SIDE * SIDE, 1],
    "that would overflow": [2**63 - 1, 2**63 - 1, SIDE * SIDE + 2],
    "of more than 64 bits": [10**30, -(10**30) + SIDE * SIDE],
    "true": [True, SIDE * SIDE - 1],
    "not integers": [0.5, SIDE * SIDE - 0.5],
    "lists": [[SIDE * SIDE]],
    "none": None,
}


@pytest.mark.parametrize("counts", WRONG_COUNTS.values(), ids=WRONG_COUNTS)
def test_wrong_runs_are_named(counts):
    start = time.monotonic()
    mask = {"size": [SIDE, SIDE], "counts": counts}
    (line,) = _errors(_content(_item(1, segmentation=mask)))
    assert "run-length masks that do not fit" in line
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("side", [10**9, 2**16, 2**31 - 1])
def test_masks_of_sizes_that_no_memory_holds(side):
    content = _content(_item(1, segmentation={"size": [side, side], "counts": [side * side]}))
    content["images"][0] |= {"width": side, "height": side}
    assert any("run-length masks that do not fit" in line for line in _errors(content))


# --- numbers, names, nesting ---------------------------------------------------------------------


def _nested(depth: int) -> list:
    value = []
    for _ in range(depth):
        value = [value]
    return value


WRONG_VALUES = [10**400, 1e308, float("nan"), float("inf"), True, "1", None, {}, _nested(400)]


@pytest.mark.parametrize("place", ["bbox", "segmentation", "id", "image_id", "width", "area"])
def test_wrong_values_are_named(place):
    for value in WRONG_VALUES:
        content = _content(_item(1))
        item = content["annotations"][0]
        if place == "bbox":
            item["bbox"] = [1, 1, value, 8]
        elif place == "segmentation":  # opposite signs, whose sum is small
            opposite = -value if type(value) in (int, float) else value
            item["segmentation"] = [[1, 1, value, 1, opposite, 9]]
        elif place == "width":
            content["images"][0]["width"] = value
        else:
            item[place] = -1 if (place, value) == ("area", 1e308) else value
        lines = _errors(content)
        assert lines or (place, value) == ("id", "1"), (place, value)


def test_names_are_printed_as_one_line(data, capsys):
    name = "\x1b[31mred\u202e\n" + "x" * 10_000_000
    data.content["categories"][0]["name"] = name
    data.content["annotations"][0]["category_id"] = 50
    data.content["images"][0]["file_name"] = name[:100]
    data.content["images"][1]["file_name"] = "\ud800.jpg"
    status, lines = _doctor(capsys, *data.options(), "MODEL.ROI_HEADS.NUM_CLASSES", "4")
    assert status == 1
    text = "\n".join(lines)
    assert "\x1b" not in text and "\u202e" not in text and len(text) < 50_000
    assert r"\x1b[31mred\u202e\n" in text and r"\ud800.jpg" in text


def test_deep_lists_are_named_by_fix(data, capsys, tmp_path):
    data.content["annotations"][0]["segmentation"] = "HERE"
    options = data.options()
    for depth in (800, 100_000):
        text = json.dumps(data.content).replace('"HERE"', "[" * depth + "]" * depth)
        data.file.write_text(text)
        fix = ["--fix", str(tmp_path / "fixed.json"), "--dataset", "train"]
        assert main(["--config-file", LEAF, *options, *fix]) == 1
        assert "Traceback" not in capsys.readouterr().err


def test_a_bomb_of_gzip_is_not_unpacked(data, capsys, tmp_path):
    options = data.options()
    with gzip.open(data.file, "wb") as file:
        for _ in range(300):
            file.write(b" " * 2**20)
    fix = ["--fix", str(tmp_path / "fixed.json"), "--dataset", "train"]
    assert main(["--config-file", LEAF, *options, *fix]) == 1
    assert "when unpacked, unlike annotations" in capsys.readouterr().err


# --- large numbers of errors ---------------------------------------------------------------------


def _many_categories() -> dict:
    categories = [{"id": i, "name": f"class {i % 29_000}"} for i in range(30_000)]
    return _content(*(_item(i + 1, category_id=i) for i in range(3)), categories=categories)


MANY = {
    "2 MB of runs": lambda: _content(
        _item(1, segmentation={"size": [SIDE, SIDE], "counts": "0" * 2_000_000})
    ),
    "30,000 categories": _many_categories,
    "200,000 polygons of an object": lambda: _content(_item(1, segmentation=[TRIANGLE] * 200_000)),
    "50,000 objects of an image": lambda: _content(*map(_item, range(1, 50_001))),
    "50,000 ids that are the same": lambda: _content(*[_item(1)] * 50_000),
    "50,000 images of one name": lambda: _content(
        _item(1), images=[_content()["images"][0] | {"id": i} for i in range(1, 50_001)]
    ),
}


@pytest.mark.parametrize("many", MANY.values(), ids=MANY)
def test_many_take_seconds(many):
    content = many()
    start = time.process_time()
    _errors(content)
    assert time.process_time() - start < 15


@pytest.mark.long
def test_a_million_annotations_of_an_image():
    content = _content(*map(_item, range(1, 1_000_001)))
    start = time.process_time()
    assert _errors(content) == []
    assert time.process_time() - start < 30


def test_many_are_mended_in_seconds(tmp_path):
    (tmp_path / "1.jpg").touch()
    content = _content(*(_item(1, area=32 + i) for i in range(20_000)))
    start = time.process_time()
    fix_content(content, str(tmp_path), masks=True)
    assert len(content["annotations"]) == 20_000
    assert time.process_time() - start < 10


def test_many_classes_of_one_name_are_told_apart_in_seconds():
    start = time.process_time()
    names = distinct_class_names(["a"] * 30_000, range(30_000))
    assert len(set(names)) == 30_000
    assert time.process_time() - start < 5


def test_many_missing_images_of_one_name(tmp_path):
    names = [f"{i}/image.jpg" for i in range(1_500)]
    for name in names:
        (tmp_path / "sub" / name).parent.mkdir(parents=True)
        (tmp_path / "sub" / name).touch()
    start = time.process_time()
    found = match_names(str(tmp_path), names, names)
    assert [found[name].path for name in names] == [f"sub/{name}" for name in names]
    assert time.process_time() - start < 5


# --- endless files, circular links ---------------------------------------------------------------


@pytest.mark.parametrize("place", ["annotations", "image"])
@pytest.mark.parametrize("kind", ["pipe", "circle", "device", "folder"])
def test_what_is_no_file_is_named(data, capsys, place, kind):
    options = data.options()
    path = data.file if place == "annotations" else data.image()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "circle":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    status, lines = _doctor(capsys, *options, "MODEL.ROI_HEADS.NUM_CLASSES", "4")
    assert status == 1
    assert any("ERROR" in line and str(path) in line for line in lines)


# --- VOC and YOLO --------------------------------------------------------------------------------

BOMB = """<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "xxxxxxxxxx">{}]>
<annotation><object><name>&{};</name></object></annotation>"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_with_entities_is_left_out(tmp_path, drawn, encoding):
    letters = "abcdefghij"
    pairs = zip(letters[1:], letters, strict=False)
    entities = "".join(f'<!ENTITY {new} "{10 * f"&{old};"}">' for new, old in pairs)
    (tmp_path / "000001.xml").write_text(BOMB.format(entities, "j"), encoding=encoding)
    secret = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]>'
    (tmp_path / "000002.xml").write_text(
        f"{secret}<annotation><object><name>&b;</name></object></annotation>"
    )
    conversion, _ = convert_voc(tmp_path, drawn / "train", names=["x"])
    assert conversion.left_out["images"] == 2 and not conversion.annotations


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\n" + "".join(f"b: &b{i} [{', '.join(['*a'] * 99)}]\n" for i in range(999)),
        "names: " + "[" * 5000 + "]" * 5000,
        "names: {.inf: a}",
        "names: 2020-99-99",
        "names: {[1]: a}",
    ],
)
def test_wrong_yaml_is_one_line(tmp_path, text):
    file = Path(tmp_path, "data.yaml")
    file.write_text(text)
    with pytest.raises(UserError, match=r"data\.yaml"):
        read_names(file)


def test_data_yaml_may_name_tens_of_thousands_of_classes(tmp_path):
    file = Path(tmp_path, "data.yaml")
    lines = "".join(f"  {i}: the name of class {i}\n" for i in range(30_000))
    file.write_text(f"\ufeffnames:\n{lines}", encoding="utf-8")
    assert read_names(file)[29_999] == "the name of class 29999"
