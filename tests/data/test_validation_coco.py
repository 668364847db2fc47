"""Tests checks of annotation files in COCO format: every kind of damage, and valid variants."""

import copy
import shutil
from collections.abc import Callable

import numpy as np
import pycocotools.mask as mask_util
import pytest
from drawn_set import LEAF, Copy, _doctor, _turned
from PIL import Image

from contnet.data.findings import ERROR, NOTE, Findings
from contnet.data.validation import dataset as checks
from contnet.data.validation.coco import DatasetUse, check_instances
from contnet.launch.arguments import configure
from contnet.utils.errors import UserError

pytest_plugins = ["drawn_set"]


def _set(*path: str | int, to: object) -> Callable[[Copy], None]:
    def change(data: Copy) -> None:
        node = data.content
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = to

    return change


def _item(key: str, to: object) -> Callable[[Copy], None]:
    return _set("annotations", 0, key, to=to)


def _drop(*path: str | int) -> Callable[[Copy], None]:
    def change(data: Copy) -> None:
        node = data.content
        for part in path[:-1]:
            node = node[part]
        del node[path[-1]]

    return change


def _twice(key: str) -> Callable[[Copy], None]:
    def change(data: Copy) -> None:
        data.content[key].append(copy.deepcopy(data.content[key][0]))

    return change


def _every_box_relative(data: Copy) -> None:
    for item in data.content["annotations"]:
        item["bbox"] = [0.1, 0.2, 0.3, 0.4]


def _all_crowds(data: Copy) -> None:
    for item in data.content["annotations"]:
        item["iscrowd"] = 1


def _rle_of_another_size(data: Copy) -> None:
    data.item["segmentation"] = {"size": [9, 9], "counts": [81]}


def _two_points_of_many(data: Copy) -> None:
    data.item["segmentation"].append([1, 2, 3, 4])


def _short_rle(data: Copy) -> None:
    image = data.content["images"][0]
    size = [image["height"], image["width"]]
    mask = mask_util.encode(np.zeros(size, np.uint8, order="F"))
    data.item["segmentation"] = {"size": size, "counts": mask["counts"].decode()[:-1]}


STRUCTURE = {
    "no images": (_drop("images"), "'images'"),
    "images are no list": (_set("images", to={}), "'images'"),
    "empty images": (_set("images", to=[]), "lists no image"),
    "no annotations": (_drop("annotations"), "nothing can be learned"),
    "image without name": (_drop("images", 0, "file_name"), "file_name"),
    "image without size": (_drop("images", 0, "width"), "width and height"),
    "image id twice": (_twice("images"), "image ids that occur twice: 1 [1]"),
    "ids of two types": (_set("images", 0, "id", to="x"), "image ids are numbers"),
    "annotation id twice": (_twice("annotations"), "annotation ids that occur twice: 1 [1]"),
    "unknown image": (_item("image_id", 99), "images that the file does not list"),
    "unknown category": (_item("category_id", 99), "categories that the file does not list"),
    "no category": (_drop("annotations", 0, "category_id"), "annotations without category_id"),
    "no box": (_drop("annotations", 0, "bbox"), "not 4 finite"),
    "empty box": (_item("bbox", []), "not 4 finite"),
    "NaN in a box": (_item("bbox", [1, 2, float("nan"), 4]), "not 4 finite"),
    "text in a box": (_item("bbox", [1, 2, "3", 4]), "not 4 finite"),
    "no area": (_item("bbox", [5, 5, 0, 9]), "boxes without area"),
    "negative width": (_item("bbox", [50, 50, -20, 9]), "negative width or height"),
    "outside": (_item("bbox", [5000, 5, 10, 10]), "boxes completely outside their image"),
    "corners": (_item("bbox", [100, 100, 900, 120]), "boxes far larger than their image"),
    "relative": (_every_box_relative, "all boxes lie between 0 and 1"),
    "crowds alone": (_all_crowds, "no object to train on"),
    "ignore": (_item("ignore", 1), 'annotations with "ignore"'),
    "iscrowd is a text": (_item("iscrowd", "0"), "iscrowd is neither"),
    "iscrowd is null": (_item("iscrowd", None), "iscrowd is neither"),
    "odd polygon": (_item("segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "an odd number"),
    "two points": (_item("segmentation", [[1, 2, 3, 4]]), "fewer than 3 points"),
    "flat polygon": (_item("segmentation", [1, 2, 3, 4, 5, 6]), "one list of numbers"),
    "text in a polygon": (_item("segmentation", [[1, 2, "3", 4, 5, 6]]), "polygons that are no"),
    "NaN in a polygon": (
        _item("segmentation", [[1, 2, float("nan"), 4, 5, 6]]),
        "polygons that are not lists",
    ),
    "far polygon": (_item("segmentation", [[1, 2, 9000, 4, 5, 6]]), "reach far outside"),
    "mask is a text": (_item("segmentation", "mask"), "neither polygons nor run-length"),
    "mask of another size": (_rle_of_another_size, "do not fit their image's size"),
    "mask cut off": (_short_rle, "do not fit their image's size"),
}


@pytest.mark.parametrize("damage", STRUCTURE)
def test_damaged_annotations(data, capsys, damage):
    """The doctor reports it with other findings, the check before training as the only error."""
    change, said = STRUCTURE[damage]
    change(data)
    # The number of classes is set, so that only the data can be wrong.
    options = [*data.options(), "MODEL.ROI_HEADS.NUM_CLASSES", "4"]
    status, lines = _doctor(capsys, *options)
    assert status == 1
    errors = [line for line in lines if line.startswith("  ERROR")]
    assert any(said in line for line in errors), lines
    assert lines[-1].endswith("this would stop or corrupt training")
    cfg, _ = configure(LEAF, options)
    with pytest.raises(UserError) as raised:
        checks.check_datasets(cfg, ["train", "val"])
    assert "data set train: " in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop("categories"), "'categories' must be a list"),
        (_set("categories", to=[]), "has no categories"),
        (_twice("categories"), "category id 1 occurs twice"),
        (_set("categories", 0, to={"id": "a", "name": "x"}), "each category must have"),
    ],
)
def test_damaged_categories(data, capsys, change, said):
    change(data)
    for more in ([], ["MODEL.ROI_HEADS.NUM_CLASSES", "4"]):
        status, lines = _doctor(capsys, *data.options(), *more)
        assert status == 1
        assert any(said in line for line in lines), lines


def _linked(data: Copy) -> None:
    shutil.move(data.image(), data.root / "elsewhere.jpg")
    data.image().symlink_to(data.root / "elsewhere.jpg")


def _as_png(mode: str) -> Callable[[Copy], None]:
    def change(data: Copy) -> None:
        Image.open(data.image()).convert(mode).save(data.image(), format="PNG")

    return change


def _some_image_empty(data: Copy) -> None:
    data.content["annotations"] = [
        item for item in data.content["annotations"] if item["image_id"] != 1
    ]


def _fewer_images(data: Copy) -> None:
    data.content["images"].pop(0)
    _some_image_empty(data)


def _class_without_objects(data: Copy) -> None:
    data.content["annotations"] = [
        item for item in data.content["annotations"] if item["category_id"] != 2
    ]


def _crowd_masks(data: Copy) -> None:
    image = data.content["images"][0]
    size = [image["height"], image["width"]]
    data.item["iscrowd"] = 1
    data.item["segmentation"] = {"size": size, "counts": [20, 30, size[0] * size[1] - 50]}
    mask = np.zeros(size, np.uint8, order="F")
    mask[10:90, 20:99:3] = 1
    other = data.content["annotations"][1]
    other["segmentation"] = mask_util.encode(mask)
    other["segmentation"]["counts"] = other["segmentation"]["counts"].decode()


def _bare(data: Copy) -> None:
    del data.content["info"], data.content["licenses"]
    for item in data.content["annotations"]:
        for key in ("segmentation", "area", "iscrowd"):
            item.pop(key)
        item["keypoints"] = [3, 3, 2]


HARMLESS = {
    "nothing": (lambda data: None, ""),
    "subset": (_fewer_images, ""),
    "no file of an image is listed": (lambda data: data.content["images"].pop(), ""),
    "image without objects": (_some_image_empty, "1 of 4 images have no objects"),
    "class without objects": (_class_without_objects, "classes without objects: 1 [square]"),
    "same file twice": (
        lambda data: data.content["images"].append({**data.content["images"][0], "id": 9}),
        "listed twice",
    ),
    "box over the edge": (_item("bbox", [-9, -9, 20, 20]), "boxes that reach outside"),
    "polygon over the edge": (_item("segmentation", [[-3, 2, 30, 4, 5, 60]]), ""),
    "EXIF, as annotated": (_turned(6, True), "annotations must be for the rotated images"),
    "EXIF upside down": (_turned(3, False), "annotations must be for the rotated images"),
    "run-length masks": (_crowd_masks, ""),
    "link": (_linked, ""),
    **{f"mode {mode}": (_as_png(mode), "") for mode in ("L", "LA", "P", "RGBA")},
    "boxes, no masks, keypoints": (_bare, ""),
    "names twice": (_set("categories", 0, "name", to="square"), "have the same name"),
}


@pytest.mark.parametrize("oddity", HARMLESS)
def test_harmless(data, drawn, capsys, oddity):
    change, said = HARMLESS[oddity]
    if "no file" in oddity:
        _drop_objects_of_last(data)
    change(data)
    options = data.options()
    if oddity == "names twice":  # both files must have the same classes
        sets = [[split, str(data.file), str(data.root / "train")] for split in ("train", "val")]
        options += ["DATASETS.REGISTER", str(sets)]
    status, lines = _doctor(capsys, *options)
    assert status == 0, lines
    assert not any("ERROR" in line for line in lines)
    if said:
        assert any(line.startswith("  NOTE") and said in line for line in lines), lines
    elif oddity == "nothing":
        assert lines[-1].startswith("0 errors, ")
        assert lines[-1].endswith(": training can start")
    cfg, _ = configure(LEAF, options)
    checks.check_datasets(cfg, ["train", "val"])


def _drop_objects_of_last(data: Copy) -> None:
    last = data.content["images"][-1]["id"]
    data.content["annotations"] = [
        item for item in data.content["annotations"] if item["image_id"] != last
    ]


def test_evaluation_needs_area_and_iscrowd(data, capsys):
    _bare(data)
    options = [*data.options(), "DATASETS.TEST", "('train',)"]
    status, lines = _doctor(capsys, *options)
    assert status == 1
    assert any("without area, iscrowd" in x for x in lines)


@pytest.mark.parametrize("area", ["12", None, float("nan"), -1])
def test_evaluation_needs_areas_that_are_numbers(data, capsys, area):
    data.item["area"] = area
    assert _doctor(capsys, *data.options())[0] == 0
    status, lines = _doctor(capsys, *data.options(), "DATASETS.TEST", "('train',)")
    assert status == 1
    assert any("area is not a number" in x for x in lines)


def _crowd_without_mask(data: Copy) -> None:
    data.item["iscrowd"] = 1
    del data.item["segmentation"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_crowd_without_mask, "objects without a mask"),
        (_two_points_of_many, "which evaluation misreads"),
    ],
)
def test_evaluation_of_masks_needs_all_of_them(data, capsys, change, said):
    change(data)
    masks = ["DATASETS.TEST", "('train',)", "MODEL.MASK_ON", "True"]
    status, lines = _doctor(capsys, *data.options(), *masks)
    assert status == 1
    assert any("ERROR" in line and said in line for line in lines), lines
    for options in ([], masks[:2], masks[2:]):
        assert not any(said in line for line in _doctor(capsys, *data.options(), *options)[1])


def test_id_0_is_noted_where_it_is_evaluated(data, capsys):
    data.item["id"] = 0
    assert not any("id 0" in line for line in _doctor(capsys, *data.options())[1])
    status, lines = _doctor(capsys, *data.options(), "DATASETS.TEST", "('train',)")
    assert status == 0
    assert any("NOTE" in line and "annotation id 0" in line for line in lines)


def test_masks_as_the_config_wants_them(data, capsys):
    _crowd_masks(data)
    options = [*data.options(), "MODEL.MASK_ON", "True"]
    status, lines = _doctor(capsys, *options)
    assert status == 1
    assert any("INPUT.MASK_FORMAT" in x for x in lines)
    assert _doctor(capsys, *options, "INPUT.MASK_FORMAT", "bitmask")[0] == 0


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("more", [0, 1])
def test_compressed_masks_that_fit_and_that_do_not(data, share, more):
    """`more`: number of pixels of the mask beyond the image."""
    image = data.content["images"][0]
    size = [image["height"], image["width"]]
    pixels = np.random.default_rng(0).random((size[0] * size[1] + more, 1)) < share
    mask = mask_util.encode(np.asfortranarray(pixels.astype(np.uint8)))
    data.item["segmentation"] = {"size": size, "counts": mask["counts"].decode()}
    findings = Findings()
    check_instances(data.content, DatasetUse(True, False, masks=True, bitmasks=True), findings)
    assert [line.startswith("run-length masks") for line in findings.lines(ERROR)] == [True] * more


def test_few_lost_objects_of_many_are_a_note(data):
    """COCO's own file has two boxes without area."""
    use = DatasetUse(trained=True, evaluated=False, masks=False, bitmasks=False)
    data.item["bbox"] = [5, 5, 9, 0]
    for total, severity in ((999, ERROR), (1000, NOTE)):
        content = copy.deepcopy(data.content)
        more = [
            {**copy.deepcopy(content["annotations"][1]), "id": 100 + n}
            for n in range(total - len(content["annotations"]))
        ]
        content["annotations"] += more
        findings = Findings()
        check_instances(content, use, findings)
        (line,) = findings.lines(severity)
        assert line.startswith("boxes without area")
