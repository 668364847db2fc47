"""Tests what training skips and what changes AP, and misleading annotation files."""

import gzip
import unicodedata
from collections.abc import Callable

import pycocotools.mask as mask_util
import pytest
from drawn_set import LEAF, Copy, _doctor, rename_images
from PIL import Image

from contnet.data.findings import ERROR, NOTE, SUSPECT, WARNING, Findings
from contnet.data.validation.coco import check_instances
from contnet.data.validation.dataset import check_dataset, check_datasets
from contnet.data.validation.masks import DatasetUse
from contnet.launch.arguments import configure

pytest_plugins = ["drawn_set"]

BOTH = DatasetUse(trained=True, evaluated=True, masks=False, bitmasks=False)


def _check(content: dict, use: DatasetUse = BOTH) -> Findings:
    findings = Findings()
    check_instances(content, use, findings)
    return findings


def _every(data: Copy) -> list[dict]:
    return data.content["annotations"]


def _repeat(data: Copy, total: int) -> None:
    """Repeats the first object until there are ``total`` objects."""
    _every(data)[:] = [{**data.item, "id": number + 1} for number in range(total)]


# --- skipped objects -----------------------------------------------------------------------------


@pytest.mark.parametrize(("crowds", "many"), [(0, 0), (1, 0), (5, 0), (6, 1), (60, 1)])
def test_more_than_one_crowd_in_twenty_is_no_accident(data, crowds, many):
    _repeat(data, 100)
    for item in _every(data)[:crowds]:
        item["iscrowd"] = 1
    found = _check(data.content)
    assert found.lines(ERROR) == []
    assert len(found.lines(SUSPECT)) == many
    assert f"skips {crowds} of 100 objects" in found.left_out


def test_many_crowds_are_an_error_of_the_doctor_and_a_warning_of_a_training(data, capsys):
    for item in _every(data)[::2]:
        item["iscrowd"] = 1
    options = data.options()
    status, lines = _doctor(capsys, *options)
    assert status == 1
    assert any(line.startswith("  ERROR") and "are crowds" in line for line in lines)
    cfg, _ = configure(LEAF, options)
    for _ in range(2):  # the second time from the cache
        warnings, notes = check_datasets(cfg, ["train", "val"])
        assert [line for line in warnings if "data set train" in line and "are crowds" in line]
        assert [line.startswith("data set train: training skips") for line in notes] == [True]


def _left_out(data: Copy) -> None:
    """Makes the objects of image 1 crowds, removes those of image 2, and damages three others."""
    items = _every(data)
    items[:] = [item for item in items if item["image_id"] != 2]
    for item in items:
        item["iscrowd"] = int(item["image_id"] == 1)
    last = [item for item in items if item["image_id"] > 2][:3]
    last[0]["bbox"] = [5, 5, 0, 9]
    last[1]["bbox"] = [5000, 5, 9, 9]
    last[2]["segmentation"] = [[1, 2, 3, 4]]


@pytest.mark.parametrize("filtered", [True, False])
def test_what_is_left_out_is_counted(data, filtered):
    _left_out(data)
    crowds = sum(item["iscrowd"] for item in _every(data))
    use = DatasetUse(True, False, masks=False, bitmasks=False, filtered=filtered)
    line = _check(data.content, use).left_out
    total = len(_every(data))
    assert f"{crowds + 3} of {total} objects ({crowds} crowds" in line
    assert all(f"1 {what}" in line for what in ("box without area", "box outside", "object with"))
    assert f"and {2 * filtered} of 4 images" in line
    assert "1 without objects" in line and "1 with only crowds" in line
    assert ("stay" in line) is not filtered


# --- areas and boxes -----------------------------------------------------------------------------


def _area(to: Callable[[float, list], object]) -> Callable[[dict], None]:
    def change(item: dict) -> None:
        item["area"] = to(item["area"], item["bbox"])

    return change


def _bare(change: Callable[[dict], None]) -> Callable[[dict], None]:
    def without_mask(item: dict) -> None:
        del item["segmentation"]
        item["area"] = item["bbox"][2] * item["bbox"][3]
        change(item)

    return without_mask


def _box(*by: float) -> Callable[[dict], None]:
    def change(item: dict) -> None:
        item["bbox"] = [value + more for value, more in zip(item["bbox"], by, strict=True)]

    return change


def _as_rle(change: Callable[[dict], None]) -> Callable[[dict], None]:
    def encode(item: dict) -> None:
        size = 400, 400
        mask = mask_util.merge(mask_util.frPyObjects(item["segmentation"], *size))
        item["segmentation"] = {"size": list(size), "counts": mask["counts"].decode()}
        change(item)

    return encode


WRONG = {
    "0": (_area(lambda area, box: 0), "areas of 0"),
    "above the box": (_area(lambda area, box: 2 * box[2] * box[3]), "areas above width x height"),
    "half": (_area(lambda area, box: area / 2), "areas that differ from the masks"),
    "0, run-length": (_as_rle(_area(lambda area, box: 0)), "areas of 0"),
    "half, run-length": (
        _as_rle(_area(lambda area, box: area / 2)),
        "areas that differ from the masks",
    ),
    "0, no mask": (_bare(_area(lambda area, box: 0)), "areas of 0"),
    "twice, no mask": (_bare(_area(lambda area, box: 2 * area)), "areas above width x height"),
    "a quarter, no mask": (_bare(_area(lambda area, box: area / 4)), "not width x height"),
    "relative, no mask": (_bare(_area(lambda area, box: 0.01)), "not width x height"),
    "box beside its polygon": (_box(9, 9, 0, 0), "boxes that do not contain their mask"),
    "box smaller than its polygon": (_box(5, 5, -10, -10), "boxes that do not contain their mask"),
    "box beside its runs": (_as_rle(_box(9, 9, 0, 0)), "boxes that do not contain their mask"),
    "box far larger": (_box(-40, -40, 99, 99), "boxes far larger than their mask"),
}


@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
def test_numbers_that_contradict_each_other(data, wrong, evaluated):
    change, said = WRONG[wrong]
    for image in data.content["images"]:
        image["width"] = image["height"] = 400
    for item in _every(data):
        change(item)
    found = _check(data.content, DatasetUse(True, evaluated, masks=False, bitmasks=False))
    severity = WARNING if evaluated or wrong.startswith("box") else NOTE
    (line,) = [line for line in found.lines(severity) if said in line]
    assert f": {len(_every(data))} [" in line or "beside" in wrong or "larger" in wrong


def test_areas_of_masks_that_are_not_in_the_file_pass(data):
    """Areas may differ from the masks' by rounding, and files may have boxes without masks."""
    for item in _every(data):
        item["area"] = 1.02 * item["area"]
    assert _check(data.content).lines(WARNING) == []
    for item in _every(data):
        del item["segmentation"]
    assert _check(data.content).lines(WARNING) == []


def test_one_wrong_area_of_a_thousand_is_a_note(data):
    _repeat(data, 1000)
    data.item["area"] = 0
    found = _check(data.content)
    assert len(found.lines(WARNING)) == 0
    assert [line for line in found.lines(NOTE) if "areas of 0: APs" in line]


def test_crowds_have_any_area(data):
    _repeat(data, 100)
    data.item.update(iscrowd=1, area=0)
    assert _check(data.content).lines(WARNING) == []


# --- warnings of a run ---------------------------------------------------------------------------


def test_what_changes_numbers_is_a_warning_of_a_run(data):
    data.item["id"] = 0
    data.content["categories"][0]["name"] = data.content["categories"][1]["name"]
    for item in _every(data):
        item["area"] = 0
    warnings = " ".join(_check(data.content).lines(WARNING))
    assert "annotation id 0" in warnings
    assert f"{data.content['categories'][1]['name']} (ids 1, 2)" in warnings
    assert "areas of 0" in warnings
    trained = _check(data.content, DatasetUse(True, False, masks=False, bitmasks=False))
    assert len(trained.lines(WARNING)) == 1  # the warning about classes


def test_a_set_without_truth_can_be_evaluated_on(data, capsys):
    del data.content["annotations"]
    options = data.options()
    assert any("'annotations'" in line for line in _doctor(capsys, *options)[1])
    evaluated = [*options, "DATASETS.TRAIN", "('val',)", "DATASETS.TEST", "('train',)"]
    status, lines = _doctor(capsys, *evaluated)
    assert status == 0
    assert any("no ground truth" in line for line in lines)


# --- misleading files ----------------------------------------------------------------------------


def _lines(data: Copy) -> list[str]:
    options = [*data.options(), "MODEL.ROI_HEADS.NUM_CLASSES", "4"]
    return check_dataset(configure(LEAF, options)[0], "train").lines(ERROR)


def _each(key: str, field: str, to: Callable[[object], object]) -> Callable[[Copy], None]:
    def change(data: Copy) -> None:
        for entry in data.content[key]:
            entry[field] = to(entry[field])

    return change


IDS = {
    "texts in one list": (_each("images", "id", str), "image_id are numbers, while"),
    "texts in the other": (_each("annotations", "image_id", str), "image_id are strings, while"),
    "classes": (_each("annotations", "category_id", str), "category_id are strings, while"),
    "decimal points": (_each("images", "id", float), "1.0 with a decimal point"),
    "decimal points of classes": (_each("categories", "id", float), "1.0 with a decimal point"),
    "texts of classes": (_each("categories", "id", str), 'not the string "1"'),
    "decimal points in objects": (_each("annotations", "image_id", float), "1.0 with a decimal"),
    "annotation ids": (_each("annotations", "id", float), "1.0 with a decimal point"),
    "nothing": (_each("images", "id", lambda value: None), "images without an id"),
    "texts as boxes": (
        _each("annotations", "bbox", lambda box: list(map(str, box))),
        "but strings",
    ),
    "texts as sizes": (_each("images", "width", str), "(the string "),
    "no sizes": (
        _each("images", "height", lambda value: None),
        "width and height are not integers",
    ),
    "numbers as masks": (
        _each("annotations", "segmentation", lambda mask: mask[0]),
        "masks that are one list of numbers",
    ),
    "points as masks": (
        _each("annotations", "segmentation", lambda mask: [[[1, 2], [3, 4], [9, 5], [2, 3]]]),
        "or of points",
    ),
}


@pytest.mark.parametrize("damage", ["texts as sizes", "no sizes"])
def test_images_are_not_blamed_for_sizes_that_are_none(data, capsys, damage):
    IDS[damage][0](data)
    _, lines = _doctor(capsys, *data.options(), "MODEL.ROI_HEADS.NUM_CLASSES", "4")
    assert [line for line in lines if line.startswith("  ERROR") and "another size" in line] == []


@pytest.mark.parametrize("damage", IDS)
def test_one_line_says_what_the_difference_is(data, damage):
    change, said = IDS[damage]
    change(data)
    lines = _lines(data)
    assert any(said in line for line in lines), lines
    if damage != "nothing":
        assert len(lines) == 1, lines  # no wrong conclusion follows


def test_images_without_a_name_are_not_called_unlisted(data):
    for image in data.content["images"]:
        image["path"] = image.pop("file_name")
    (line,) = _lines(data)
    assert "they have 'path' instead" in line


def _nfd(name: str) -> str:
    return unicodedata.normalize("NFD", f"é{name}")


NAMES = {
    "backslashes": (
        rename_images(lambda name: f"a/{name}", lambda name: f"a\\{name}"),
        "instead of /",
    ),
    "a machine's prefix": (
        rename_images(lambda name: name, lambda name: f"/home/other/{name}"),
        "a leading path",
    ),
    "upper case": (rename_images(lambda name: name, str.upper), "upper or lower case"),
    "ending": (rename_images(lambda name: name, lambda name: name[:-3] + "png"), "another ending"),
    "NFC": (
        rename_images(_nfd, lambda name: unicodedata.normalize("NFC", _nfd(name))),
        r"'\xe9000001.jpg' is 'e\u0301000001.jpg'",
    ),
    "deeper": (
        rename_images(lambda name: f"images/{name}", lambda name: name),
        "they are in images/",
    ),
}


@pytest.mark.parametrize("damage", NAMES)
def test_names_that_differ_are_told_from_images_that_are_missing(data, damage):
    change, said = NAMES[damage]
    change(data)
    (line,) = _lines(data)
    assert said in line
    assert "missing" not in line and "DATASETS.REGISTER" not in line


def test_a_path_before_a_name_that_leads_there_is_fine(data):
    _each("images", "file_name", lambda name: f"./{name}")(data)
    assert _lines(data) == []


def test_single_missing_images_are_no_wrong_path(data):
    """Another folder has an image with that name."""
    assert (data.root / "val" / data.image(0).name).exists()
    data.image(0).unlink()
    (line,) = _lines(data)
    assert "1 of 4" in line and "DATASETS.REGISTER" not in line and "folder" not in line


@pytest.mark.parametrize(
    "other", ["1.xml", "1.png", "masks/1.png", "masks/1.jpg", "val/1.jpg", "b/1.jpg"]
)
def test_other_files_of_the_same_name_are_not_taken_for_an_image(data, other):
    """These are labels and masks beside the images, and images in other folders."""
    root = data.root / "train"
    for number, image in enumerate(data.content["images"], 1):
        (root / image["file_name"]).rename(root / f"{number}.jpg")
        image["file_name"] = f"{number}.jpg"
    if other == "1.png":
        Image.open(root / "2.jpg").save(root / "2.png")
    if other == "b/1.jpg":
        (root / "a").mkdir()
        (root / "1.jpg").rename(root / "a" / "1.jpg")
        data.content["images"][0]["file_name"] = "a/1.jpg"
    (root / other).parent.mkdir(exist_ok=True)
    Image.open(root / "2.jpg").save(root / other, format="PNG")
    data.image(0).unlink()
    (line,) = _lines(data)
    assert "missing images (1 of 4" in line


def test_another_folder_is_named(data):
    options = data.options()
    other = (data.root / "train").rename(data.root / "pictures")
    (data.root / "train").mkdir()
    options += ["MODEL.ROI_HEADS.NUM_CLASSES", "4"]
    (line,) = check_dataset(configure(LEAF, options)[0], "train").lines(ERROR)
    assert "4 of 4" in line and f"did you mean the folder {other}?" in line


FORMS = {
    "detections": (
        [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}],
        "results",
    ),
    "Label Studio": ([{"id": 1, "data": {"image": "a.jpg"}, "annotations": []}], "Label Studio"),
    "LabelMe": ({"shapes": [], "imagePath": "a.jpg"}, "LabelMe"),
    "VIA": ({"a.jpg12": {"filename": "a.jpg", "regions": []}}, "VIA"),
    "CreateML": ([{"image": "a.jpg", "annotations": []}], "CreateML"),
    "an empty list": ([], "'images' must be a list"),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_are_named(data, form):
    content, said = FORMS[form]
    data.content = content
    (line,) = _lines(data)
    assert said in line


TEXTS = {
    "byte order mark": (lambda text: b"\xef\xbb\xbf" + text, "byte order mark"),
    "UTF-16": (lambda text: text.decode().encode("utf-16"), "UTF-16"),
    "gzip": (lambda text: gzip.compress(text), "gzip"),
    "zip": (lambda text: b"PK\x03\x04" + text, "zip"),
    "XML": (lambda text: b"<annotation></annotation>", "XML"),
    "JSON lines": (lambda text: b'{"a": 1}\n{"a": 2}\n', "one per line"),
    "nothing": (lambda text: b"", "empty"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_other_files_are_named(data, kind):
    options = [*data.options(), "MODEL.ROI_HEADS.NUM_CLASSES", "4"]
    change, said = TEXTS[kind]
    data.file.write_bytes(change(data.file.read_bytes()))
    (line,) = check_dataset(configure(LEAF, options)[0], "train").lines(ERROR)
    assert said in line


def test_files_of_macos_are_no_images(data):
    data.content["images"].append({**data.content["images"][0], "id": 9, "file_name": "._1.jpg"})
    (data.root / "train" / "._1.jpg").write_bytes(b"\0")
    (line,) = _lines(data)
    assert "._1.jpg" in line and "--fix" in line
