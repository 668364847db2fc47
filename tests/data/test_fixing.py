"""Tests --fix for each kind of damage; the doctor and pycocotools check the fixed copy."""

import contextlib
import gzip
import io
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drawn_set import LEAF, Copy, rename_images
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from contnet.commands.doctor import main
from contnet.data.findings import ERROR, WARNING
from contnet.data.validation.dataset import check_dataset
from contnet.launch.arguments import configure

pytest_plugins = ["drawn_set"]


def _each(key: str, field: str, to: Callable[[object], object]) -> Callable[[Copy], None]:
    """Changes a field in all entries of a list; None removes it."""

    def change(data: Copy) -> None:
        for entry in data.content[key]:
            if (value := to(entry.get(field))) is None:
                entry.pop(field, None)
            else:
                entry[field] = value

    return change


def _all(*changes: Callable[[Copy], None]) -> Callable[[Copy], None]:
    def change(data: Copy) -> None:
        for each in changes:
            each(data)

    return change


def _texts(value: object) -> object:
    return [_texts(each) for each in value] if isinstance(value, list) else str(value)


def _image_ids(to: Callable[[int], object]) -> Callable[[Copy], None]:
    return _all(_each("images", "id", to), _each("annotations", "image_id", to))


def _category_ids(to: Callable[[int], object]) -> Callable[[Copy], None]:
    return _all(_each("categories", "id", to), _each("annotations", "category_id", to))


def _more(key: str, **changes: object) -> Callable[[Copy], None]:
    """Adds a copy of the first entry with some other fields."""

    def change(data: Copy) -> None:
        data.content[key].append({**data.content[key][0], **changes})

    return change


def _names(to: Callable[[str], str]) -> Callable[[Copy], None]:
    return _each("images", "file_name", to)


def _under(key: str) -> Callable[[Copy], None]:
    def change(data: Copy) -> None:
        for image in data.content["images"]:
            image[key] = f"/home/other/{image.pop('file_name')}"

    return change


def _bad_polygon(data: Copy) -> None:
    data.item["segmentation"] += [[1, 2, 3, 4], []]


def _same_ids(data: Copy) -> None:
    for item in data.content["annotations"][:3]:
        item["id"] = 2


def _single(to: Callable[[list], list]) -> Callable[[Copy], None]:
    """Changes masks with one polygon."""
    return _each("annotations", "segmentation", lambda mask: mask if mask[1:] else to(mask))


def _points(mask: list) -> list:
    return [list(map(list, zip(part[::2], part[1::2], strict=True))) for part in mask]


DAMAGE = {
    "image ids: texts": _image_ids(str),
    "image ids: texts in one list": _each("images", "id", str),
    "image ids: texts in the other": _each("annotations", "image_id", str),
    "image ids: with a decimal point": _image_ids(float),
    "image ids: words": _image_ids(lambda number: f"frame-{number}-a"),
    "category ids: texts": _category_ids(str),
    "category ids: texts in one list": _each("annotations", "category_id", str),
    "category ids: with a decimal point": _category_ids(float),
    "annotation ids: from 0": _each("annotations", "id", lambda number: number - 1),
    "annotation ids: none": _each("annotations", "id", lambda number: None),
    "annotation ids: words": _each("annotations", "id", lambda number: f"a{number}"),
    "annotation ids: with a decimal point": _each("annotations", "id", float),
    "annotation ids: twice": _same_ids,
    "the same annotation twice": _more("annotations"),
    "the same image twice": _more("images"),
    "an image id twice, without objects": _all(
        _each("annotations", "image_id", lambda number: number),
        _more("images", id=77, file_name="no.jpg"),
        _more("images", id=77, file_name="no2.jpg"),
    ),
    "backslashes": rename_images(lambda name: f"a/{name}", lambda name: f"a\\{name}"),
    "a prefix of Windows": _names(lambda name: f"C:\\data\\train\\{name}"),
    "a prefix of another machine": _names(lambda name: f"/home/other/train/{name}"),
    "deeper in the folder": rename_images(lambda name: f"images/{name}", lambda name: name),
    "upper case": _names(str.upper),
    "another ending": _names(lambda name: name.replace(".jpg", ".png")),
    "escapes": rename_images(lambda name: f"a b{name}", lambda name: f"a%20b{name}"),
    "NFC for NFD": rename_images(
        lambda name: unicodedata.normalize("NFD", f"é{name}"),
        lambda name: unicodedata.normalize("NFC", f"é{name}"),
    ),
    "all of it": rename_images(
        lambda name: unicodedata.normalize("NFD", f"é{name}"),
        lambda name: "D:\\x\\" + unicodedata.normalize("NFC", f"é{name}").upper(),
    ),
    "names under another key": _under("path"),
    "an image that is missing": _all(
        _more("images", id=50, file_name="gone.jpg"),
        _more("annotations", id=500, image_id=50),
    ),
    "a note of macOS": _more("images", id=50, file_name="._000001.jpg"),
    "sizes: texts": _each("images", "width", str),
    "sizes: with a decimal point": _each("images", "height", float),
    "sizes: none": _each("images", "height", lambda value: None),
    "boxes: texts": _each("annotations", "bbox", _texts),
    "boxes: none": _each("annotations", "bbox", lambda value: None),
    "a box without area": _more("annotations", id=500, bbox=[5, 5, 0, 9], segmentation=[]),
    "polygons: texts": _each("annotations", "segmentation", _texts),
    "polygons that are none": _bad_polygon,
    "polygons: points": _each("annotations", "segmentation", _points),
    "polygons: points, in no list": _single(lambda mask: _points(mask)[0]),
    "polygons: in no list": _single(lambda mask: mask[0]),
    "areas: none": _each("annotations", "area", lambda value: None),
    "areas: texts": _each("annotations", "area", str),
    "areas: 0": _each("annotations", "area", lambda value: 0),
    "areas: far too large": _each("annotations", "area", lambda value: 99 * value),
    "areas: NaN": _each("annotations", "area", lambda value: float("nan")),
    "iscrowd: none": _each("annotations", "iscrowd", lambda value: None),
    "iscrowd: texts": _each("annotations", "iscrowd", str),
    "an object of no image": _more("annotations", id=500, image_id=99),
}
BYTES = {
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-le"),
    "gzip": lambda text: gzip.compress(text.encode()),
}


def _options(name: str, file: Path, folder: Path) -> list[str]:
    return [
        *("DATASETS.REGISTER", str([[name, str(file), str(folder)]])),
        *("DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"),
    ]


def _fix(data: Copy, out: Path, *options: str) -> int:
    own = _options("damaged", data.file, data.root / "train")
    return main(["--config-file", LEAF, "--fix", str(out), *own, *options])


def _statistics(file: Path) -> np.ndarray:
    """Returns COCO statistics of detections that depend only on names and boxes."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        found = []
        for image in truth.imgs.values():
            items = truth.imgToAnns[image["id"]]
            for number, item in enumerate(sorted(items, key=lambda x: x["bbox"])):
                x, y, width, height = item["bbox"]
                found.append(
                    {
                        "image_id": image["id"],
                        "category_id": item["category_id"],
                        "bbox": [x + number, y, width, height + 2 * number],
                        "score": (1 + (7 * number) % 5) / 9,
                        "segmentation": item["segmentation"],
                    }
                )
        results = truth.loadRes(found)
        statistics = []
        for task in ("bbox", "segm"):
            evaluation = COCOeval(truth, results, task)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            statistics.append(evaluation.stats)
    return np.concatenate(statistics)


def _check(data: Copy, out: Path, expected: np.ndarray) -> None:
    cfg, _ = configure(LEAF, _options("fixed", out, data.root / "train"))
    found = check_dataset(cfg, "fixed")
    assert found.lines(ERROR) == [] and found.lines(WARNING) == []
    np.testing.assert_array_equal(_statistics(out), expected)


@pytest.fixture(scope="module")
def expected(drawn) -> np.ndarray:
    return _statistics(drawn / "annotations" / "instances_train.json")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_fixed(data, expected, capsys, tmp_path, damage):
    DAMAGE[damage](data)
    data.file.write_text(json.dumps(data.content))
    before, out = data.file.read_bytes(), tmp_path / "out.json"
    assert _fix(data, out) == 0, capsys.readouterr()
    assert "  fixed" in capsys.readouterr().out
    assert data.file.read_bytes() == before
    _check(data, out, expected)


@pytest.mark.parametrize("ending", ["jpg", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_missing_sizes_are_those_of_upright_images(data, tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = data.root / "train" / f"turned.{ending}"
    Image.new("RGB", (150, 200)).save(path, exif=exif)
    data.content["images"].append({"id": 77, "file_name": path.name})
    data.file.write_text(json.dumps(data.content))
    assert _fix(data, tmp_path / "out.json") == 0
    image = json.loads((tmp_path / "out.json").read_text())["images"][-1]
    with Image.open(path) as stored:
        assert (image["width"], image["height"]) == ImageOps.exif_transpose(stored).size


@pytest.mark.parametrize("encoding", BYTES)
def test_bytes_are_fixed(data, expected, tmp_path, encoding):
    data.file.write_bytes(BYTES[encoding](data.file.read_text()))
    assert _fix(data, tmp_path / "out.json") == 0
    _check(data, tmp_path / "out.json", expected)


def test_ids_of_before_are_kept(data, tmp_path):
    _image_ids(lambda number: f"frame {number}")(data)
    data.file.write_text(json.dumps(data.content))
    assert _fix(data, tmp_path / "out.json") == 0
    content = json.loads((tmp_path / "out.json").read_text())
    (pairs,) = content["contnet_fix"].values()
    ids = dict(pairs)
    names = {image["file_name"]: image["id"] for image in content["images"]}
    assert names == {image["file_name"]: ids[image["id"]] for image in data.content["images"]}


def test_nothing_is_guessed(data, capsys, tmp_path):
    """Two images have the same id, so objects may belong to either."""
    _more("images", file_name=data.content["images"][1]["file_name"])(data)
    data.file.write_text(json.dumps(data.content))
    assert _fix(data, tmp_path / "out.json") == 1
    assert "image ids that occur twice: 1 [1]" in capsys.readouterr().out


def test_nothing_is_replaced(data, capsys, tmp_path):
    DAMAGE["areas: 0"](data)
    data.file.write_text(json.dumps(data.content))
    before = data.file.read_bytes()
    link = tmp_path / "link.json"
    os.link(data.file, link)
    for out in (data.file, link, tmp_path / "none" / "out.json"):
        assert _fix(data, out) == 1
        assert capsys.readouterr().err.startswith("error: ")
    assert data.file.read_bytes() == before


def test_a_wrong_folder_is_no_reason_to_drop_all(data, capsys, tmp_path):
    for image in data.content["images"]:
        (data.root / "train" / image["file_name"]).unlink()
    assert _fix(data, tmp_path / "out.json") == 1
    assert "check the folder" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_of_several_sets_the_damaged_one_is_fixed(data, capsys, tmp_path):
    options = data.options()
    fix = ["--config-file", LEAF, "--fix", str(tmp_path / "out.json"), *options]
    assert main(fix) == 1
    DAMAGE["areas: 0"](data)
    data.options()
    assert main(fix) == 0
    assert "data set train: " in capsys.readouterr().out
    other = data.root / "annotations" / "instances_val.json"
    other.write_text(other.read_text().replace('"area": ', '"area": 0.'))
    fix[3] = str(tmp_path / "other.json")
    assert main(fix) == 2
    assert "--dataset" in capsys.readouterr().err
    assert main([*fix, "--dataset", "val"]) == 0
