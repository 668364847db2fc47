"""Tests checks of Cityscapes' layout: every kind of damage, and valid variants."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from drawn_set import _doctor
from PIL import Image

from contnet.data.datasets.cityscapes_labels import prepare_cityscapes

SIZE = (64, 32)
INSTANCE = ["MODEL.ROI_HEADS.NUM_CLASSES", "8"]
SEMANTIC = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "19"]


def _make_city(root: Path, split: str, count: int) -> None:
    """Makes scenes with a road below, sky above, and one car."""
    images, labels = (root / part / split / "town" for part in ("leftImg8bit", "gtFine"))
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    objects = [
        {"label": "sky", "polygon": [[0, 0], [63, 0], [63, 15], [0, 15]]},
        {"label": "road", "polygon": [[0, 16], [63, 16], [63, 31], [0, 31]]},
        {"label": "car", "polygon": [[10, 18], [30, 18], [30, 28], [10, 28]]},
        {"label": "cargroup", "polygon": [[40, 18], [50, 18], [50, 28], [40, 28]]},
    ]
    content = {"imgWidth": SIZE[0], "imgHeight": SIZE[1], "objects": objects}
    ids, train_ids, instances = (np.zeros(SIZE[::-1], np.uint16) for _ in range(3))
    for values, sky, road, car, group in (
        (ids, 23, 7, 26, 26),
        (train_ids, 10, 0, 13, 255),
        (instances, 23, 7, 26000, 26),
    ):
        values[:16], values[16:], values[18:29, 10:31], values[18:29, 40:51] = sky, road, car, group
    rng = np.random.default_rng(0)
    for number in range(count):
        stem = f"town_000000_{number:06d}"
        pixels = rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{stem}_leftImg8bit.png")
        (labels / f"{stem}_gtFine_polygons.json").write_text(json.dumps(content))
        Image.fromarray(ids.astype(np.uint8)).save(labels / f"{stem}_gtFine_labelIds.png")
        Image.fromarray(train_ids.astype(np.uint8)).save(
            labels / f"{stem}_gtFine_labelTrainIds.png"
        )
        Image.fromarray(instances).save(labels / f"{stem}_gtFine_instanceIds.png")


@pytest.fixture
def city(tmp_path, monkeypatch) -> Path:
    """Makes a Cityscapes where this process's Detectron2 finds it."""
    root = tmp_path / "cityscapes"
    for split, count in (("train", 3), ("val", 1)):
        _make_city(root, split, count)
        for task in ("instance_seg", "sem_seg"):
            facts = vars(MetadataCatalog.get(f"cityscapes_fine_{task}_{split}"))
            monkeypatch.setitem(facts, "image_dir", str(root / "leftImg8bit" / split))
            monkeypatch.setitem(facts, "gt_dir", str(root / "gtFine" / split))
    return root


def _city_options(task: str) -> list[str]:
    names = [f"cityscapes_fine_{task}_{split}" for split in ("train", "val")]
    more = INSTANCE if task == "instance_seg" else SEMANTIC
    return ["DATASETS.TRAIN", f"('{names[0]}',)", "DATASETS.TEST", f"('{names[1]}',)", *more]


def _labels(root: Path, end: str) -> Path:
    return root / "gtFine" / "train" / "town" / f"town_000000_000001_gtFine_{end}"


def _photo(root: Path) -> Path:
    return root / "leftImg8bit" / "train" / "town" / "town_000000_000001_leftImg8bit.png"


@pytest.mark.parametrize("task", ["instance_seg", "sem_seg"])
def test_other_road_scenes_pass(city, capsys, task):
    status, lines = _doctor(capsys, *_city_options(task))
    assert status == 0, lines
    assert any("NOTE   3 images, Cityscapes has 2975" in line for line in lines)
    assert any("whose size is not Cityscapes' 2048x1024: 3 [town" in line for line in lines)
    objects = task == "instance_seg"
    assert lines[-1] == f"0 errors, {6 if objects else 4} notes: training can start"
    assert any("classes without objects: 7 [bicycle; bus; " in line for line in lines) == objects


def test_labels_without_images_are_noted(city, capsys):
    _photo(city).unlink()
    status, lines = _doctor(capsys, *_city_options("instance_seg"))
    assert status == 0
    assert any("NOTE" in line and "label files without an image: 3" in line for line in lines)


def _edit(**changes: object) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = _labels(root, "polygons.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _objects(label: str, polygon: object) -> Callable[[Path], None]:
    return _edit(objects=[{"label": label, "polygon": polygon}])


def _paint(end: str, value: int, size: tuple[int, int] = SIZE) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        kind = np.uint16 if end.startswith("instance") else np.uint8
        Image.fromarray(np.full(size[::-1], value, kind)).save(_labels(root, end))

    return change


def _cut(end: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = _labels(root, end)
        file.write_bytes(file.read_bytes()[:60])

    return change


TRIANGLE = [[1, 1], [9, 1], [9, 9]]
PREPARE = "run python tools/prepare_cityscapes.py"
REMAKE = f"remove them, then {PREPARE}"


def _palette(root: Path) -> None:
    """Saves the same numbers with a palette, which would be read as brightness."""
    file = _labels(root, "labelTrainIds.png")
    image = Image.fromarray(np.asarray(Image.open(file)))
    image.putpalette([7 * value % 256 for value in range(768)])
    image.save(file)


def _link_to_nowhere(root: Path) -> None:
    file = _labels(root, "labelTrainIds.png")
    file.unlink()
    file.symlink_to("nowhere.png")


def _no_objects(root: Path) -> None:
    for file in root.glob("gtFine/train/*/*_polygons.json"):
        content = json.loads(file.read_text())
        content["objects"] = [x for x in content["objects"] if x["label"] != "car"]
        file.write_text(json.dumps(content))


CITY = {
    "no train ids": (
        "sem_seg",
        lambda root: _labels(root, "labelTrainIds.png").unlink(),
        f"images without labelTrainIds.png: {PREPARE}: 1 [town_000000_000001",
    ),
    "no instance ids": (
        "instance_seg",
        lambda root: _labels(root, "instanceIds.png").unlink(),
        f"images without instanceIds.png: {PREPARE}: 1",
    ),
    "no instance ids, of segmenters": (
        "sem_seg",
        lambda root: _labels(root, "instanceIds.png").unlink(),
        f"images without instanceIds.png: {PREPARE}: 1",
    ),
    "link to nowhere": (
        "sem_seg",
        _link_to_nowhere,
        f"images without labelTrainIds.png: {PREPARE}: 1",
    ),
    "no objects": ("instance_seg", _no_objects, "it has no object to train on"),
    "no polygons": (
        "instance_seg",
        lambda root: _labels(root, "polygons.json").unlink(),
        "images without polygons.json: copy gtFine again: 1",
    ),
    "no images": (
        "instance_seg",
        lambda root: shutil.rmtree(_photo(root).parent),
        "there are no images CITY/NAME_leftImg8bit.png",
    ),
    "no folder": (
        "sem_seg",
        lambda root: shutil.rmtree(root / "gtFine" / "train"),
        "the label folder",
    ),
    "image is a link to nowhere": (
        "instance_seg",
        lambda root: (_photo(root).unlink(), _photo(root).symlink_to("nowhere.png")),
        "missing images, or broken links: 1",
    ),
    "stray file": (
        "instance_seg",
        lambda root: (_photo(root).parent / "Thumbs.db").write_text(""),
        "files that are not images",
    ),
    "stray file among cities": (
        "instance_seg",
        lambda root: (root / "leftImg8bit" / "train" / "README").write_text(""),
        "files that are not images",
    ),
    "cut polygons": ("instance_seg", _cut("polygons.json"), "polygon files that cannot be read"),
    "no sizes": ("sem_seg", _edit(imgWidth=None), "polygon files without imgWidth"),
    "unknown class": ("instance_seg", _objects("cow", TRIANGLE), "that are not in Cityscapes: 1"),
    "two points": ("instance_seg", _objects("car", TRIANGLE[:2]), "not lists of 3 or more [x, y]"),
    "NaN": ("instance_seg", _objects("car", [*TRIANGLE, [1, float("nan")]]), "not lists of 3"),
    "text": ("instance_seg", _objects("car", [*TRIANGLE, [1, "x"]]), "not lists of 3 or more"),
    "far": ("instance_seg", _objects("car", [*TRIANGLE, [999, 1]]), "reach far outside"),
    "cut image": (
        "sem_seg",
        lambda root: _photo(root).write_bytes(_photo(root).read_bytes()[:300]),
        "images that cannot be read",
    ),
    "image of another size": (
        "instance_seg",
        lambda root: Image.new("RGB", (60, 32)).save(_photo(root)),
        "images whose size differs from that in their polygon file: 1 [town_000000_000001",
    ),
    "cut labels": ("sem_seg", _cut("labelTrainIds.png"), f"files that cannot be read: {REMAKE}"),
    "labels with a palette": ("sem_seg", _palette, f"8 bits (a palette?): {REMAKE}: 1"),
    "labels in colour": (
        "sem_seg",
        lambda root: Image.new("RGB", SIZE).save(_labels(root, "labelTrainIds.png")),
        "labelTrainIds.png files in colour",
    ),
    "ids instead of train ids": (
        "sem_seg",
        _paint("labelTrainIds.png", 26),
        f"invalid values: {REMAKE}: 1",
    ),
    "wrong ids": ("sem_seg", _paint("labelIds.png", 34), "labelIds.png files with invalid values"),
    "instance of no object": (
        "instance_seg",
        _paint("instanceIds.png", 7001),
        "instanceIds.png files with invalid values",
    ),
    "labels of another size": (
        "sem_seg",
        _paint("labelTrainIds.png", 3, (32, 32)),
        "labelTrainIds.png files whose size differs from their image's: 1",
    ),
    "instances of another size": (
        "instance_seg",
        _paint("instanceIds.png", 7, (32, 32)),
        "instanceIds.png files whose size differs",
    ),
}


@pytest.mark.parametrize("damage", CITY)
def test_damaged_cityscapes(city, capsys, damage):
    task, change, said = CITY[damage]
    change(city)
    status, lines = _doctor(capsys, *_city_options(task))
    assert status == 1
    assert any(line.startswith("  ERROR") and said in line for line in lines), lines
    assert not any(
        "ERROR" in line for line in lines[lines.index(f"data set cityscapes_fine_{task}_val") :]
    )


def test_what_the_doctor_says_about_labels_helps(city, capsys):
    damages = {"labelTrainIds.png": _palette, "labelIds.png": _cut("labelIds.png")}
    for end, change in damages.items():
        change(city)
        assert _doctor(capsys, *_city_options("sem_seg"))[0] == 1
        prepare_cityscapes(city, workers=1)
        assert _doctor(capsys, *_city_options("sem_seg"))[0] == 1
        _labels(city, end).unlink()
        prepare_cityscapes(city, workers=1)
        assert _doctor(capsys, *_city_options("sem_seg"))[0] == 0


def test_other_objects_to_train_on_are_counted_anew(city, capsys):
    """A set that is valid for evaluation may not be valid for training."""
    _no_objects(city)
    names = [f"('cityscapes_fine_instance_seg_{split}',)" for split in ("val", "train")]
    options = ["DATASETS.TRAIN", names[0], "DATASETS.TEST", names[1], *INSTANCE]
    status, lines = _doctor(capsys, *options)
    assert status == 0
    assert any("NOTE" in line and "3 of 3 images have no objects" in line for line in lines)
    assert _doctor(capsys, *_city_options("instance_seg"))[0] == 1


def test_city_without_folders_is_told_where_its_layout_stands(city, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(city.parent))
    shutil.rmtree(city / "gtFine")
    _, lines = _doctor(capsys, *_city_options("sem_seg"))
    assert any("docs/cityscapes.md shows the expected files" in line for line in lines)


def test_city_of_another_kind(city, capsys):
    model = [
        "MODEL.META_ARCHITECTURE",
        "RetinaNet",
        "MODEL.RETINANET.IN_FEATURES",
        "['p3','p4','p5']",
    ]
    status, lines = _doctor(capsys, *_city_options("sem_seg"), *model)
    assert status == 1
    assert any("it has label maps, but RetinaNet requires objects" in line for line in lines)
