"""Tests the Cityscapes label files: equal to cityscapesscripts', restarts, damage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cityscapes import draw_scene, write_polygons
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.helpers.labels import labels
from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
from cityscapesscripts.preparation.json2labelImg import json2labelImg
from conftest import REPOSITORY
from detectron2.data.datasets.cityscapes import load_cityscapes_instances
from PIL import Image

import contnet.data.datasets.cityscapes_labels as preparation
from contnet.commands.prepare_cityscapes import main
from contnet.data.datasets.cityscapes_labels import LABEL_MAPS, default_root, prepare_cityscapes
from contnet.utils.errors import UserError

pytestmark = pytest.mark.numpy1

STEM = "gtFine/train/drawnham/drawnham_{:06d}_000019_gtFine"


def polygon_file(root: Path, number: int = 0) -> Path:
    return root / f"{STEM.format(number)}_polygons.json"


def label_file(root: Path, end: str, number: int = 0) -> Path:
    return root / f"{STEM.format(number)}{end}"


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def random_objects(rng: np.random.Generator, count: int = 60) -> list[dict]:
    """Draws overlapping polygons of all labels, groups and deleted ones, some outside the map."""
    names = [label.name for label in labels]
    names += [f"{label.name}group" for label in labels if label.hasInstances]
    objects = []
    for _ in range(count):
        polygon = rng.integers(-20, 140, (rng.integers(3, 9), 2)).tolist()
        objects.append({"label": str(rng.choice(names)), "polygon": polygon})
        if rng.random() < 0.2:
            objects[-1]["deleted"] = 1
    return objects


def scene(kind: str) -> list[dict]:
    if kind == "street":
        return draw_scene(np.random.default_rng(7))
    return random_objects(np.random.default_rng(int(kind)))


# --- equal to cityscapesscripts ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["street", "1", "2", "3"])
def test_files_equal_those_of_cityscapesscripts(kind, tmp_path):
    source = polygon_file(tmp_path)
    write_polygons(source, scene(kind))
    prepare_cityscapes(tmp_path, workers=1)
    for end, encoding in {"_labelIds.png": "ids", "_labelTrainIds.png": "trainIds"}.items():
        json2labelImg(str(source), str(tmp_path / "theirs.png"), encoding)
        ours, theirs = read(label_file(tmp_path, end)), read(tmp_path / "theirs.png")
        assert ours.dtype == theirs.dtype == np.uint8
        assert np.array_equal(ours, theirs)
    annotation = Annotation()
    annotation.fromJsonFile(str(source))
    ours = read(label_file(tmp_path, "_instanceIds.png"))
    assert ours.dtype == np.uint16
    assert np.array_equal(ours, np.asarray(createInstanceImage(annotation, "ids")))


def test_scenes_have_what_the_rules_are_about(tmp_path):
    """Otherwise, the test above would cover less than it should."""
    objects = draw_scene(np.random.default_rng(7))
    assert [item["label"] for item in objects if item.get("deleted")] == ["bus"]
    assert {"cargroup", "license plate", "out of roi"} <= {item["label"] for item in objects}
    write_polygons(polygon_file(tmp_path), objects)
    prepare_cityscapes(tmp_path, workers=1)
    ids = read(label_file(tmp_path, "_instanceIds.png"))
    assert {3, 26, 26000, 26001, 24000} <= set(np.unique(ids).tolist())
    assert 28 not in ids // 1000 and 28 not in ids
    trained = read(label_file(tmp_path, "_labelTrainIds.png"))
    assert set(np.unique(trained[ids == 3])) == {255}
    assert set(np.unique(trained[ids == 26])) == {13}


def test_detectron2_reads_the_same_objects_from_polygons_and_pictures(cityscapes_root):
    folders = [
        str(cityscapes_root / "cityscapes" / kind / "val") for kind in ("leftImg8bit", "gtFine")
    ]
    polygons = load_cityscapes_instances(*folders)
    pictures = load_cityscapes_instances(*folders, from_json=False)
    for one, other in zip(polygons, pictures, strict=True):
        kinds = [sorted(a["category_id"] for a in d["annotations"]) for d in (one, other)]
        assert kinds[0] == kinds[1] and len(kinds[0]) > 5


# --- restart -------------------------------------------------------------------------------------


def test_what_is_there_stays_and_what_is_missing_is_drawn(tmp_path):
    for number in range(3):
        write_polygons(polygon_file(tmp_path, number), scene("street"))
    assert prepare_cityscapes(tmp_path, workers=2) == (9, 0)
    assert prepare_cityscapes(tmp_path, workers=2) == (0, 9)
    kept, lost = (label_file(tmp_path, "_labelIds.png", number) for number in (0, 1))
    kept.write_bytes(b"from elsewhere")
    before = lost.read_bytes()
    lost.unlink()
    leftover = lost.with_name(lost.name + ".tmp")  # left by a killed run
    leftover.write_bytes(before[:50])
    assert prepare_cityscapes(tmp_path) == (1, 8)
    assert kept.read_bytes() == b"from elsewhere"
    assert lost.read_bytes() == before
    assert not leftover.exists()


# --- damage --------------------------------------------------------------------------------------

GOOD = {"label": "car", "polygon": [[1, 1], [30, 1], [30, 30]]}
DAMAGED = {
    "cut short": '{"imgHeight": 64, "imgW',
    "empty": "",
    "not text": b"\xff\xfe\x00",
    "a list": "[]",
    "without objects": json.dumps({"imgHeight": 64, "imgWidth": 128}),
    "without size": json.dumps({"objects": [GOOD]}),
    "no size": json.dumps({"imgHeight": -1, "imgWidth": 128, "objects": [GOOD]}),
    "without polygon": json.dumps(
        {"imgHeight": 64, "imgWidth": 128, "objects": [{"label": "car"}]}
    ),
}
BROKEN_OBJECTS = {
    "unknown label": {**GOOD, "label": "spaceship"},
    "unknown group": {**GOOD, "label": "spaceshipgroup"},
    "one point": {**GOOD, "polygon": [[1, 1]]},
    "no point": {**GOOD, "polygon": []},
    "texts": {**GOOD, "polygon": [["a", "b"], ["c", "d"], ["e", "f"]]},
    "numbers": {**GOOD, "polygon": [1, 2, 3]},
    "half points": {**GOOD, "polygon": [[1], [2], [3]]},
    "not finite": {**GOOD, "polygon": [[1, 1], [float("nan"), 1], [30, 30]]},
}
for _kind, _object in BROKEN_OBJECTS.items():
    DAMAGED[_kind] = json.dumps({"imgHeight": 64, "imgWidth": 128, "objects": [GOOD, _object]})


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_polygons_are_named_and_the_others_drawn(kind, tmp_path, capfd):
    for number in range(2):
        write_polygons(polygon_file(tmp_path, number), scene("street"))
    content = DAMAGED[kind]
    damaged = polygon_file(tmp_path, 0)
    damaged.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["--root", str(tmp_path), "--workers", "1"]) == 1
    captured = capfd.readouterr()
    (line,) = [x for x in captured.err.splitlines() if x.startswith("error: ")]
    assert line.startswith(f"error: 1 of 2 images have no label files: {damaged} is damaged")
    assert captured.out == "" and "Traceback" not in captured.err
    assert not [end for end in LABEL_MAPS if label_file(tmp_path, end, 0).exists()]
    assert all(label_file(tmp_path, end, 1).exists() for end in LABEL_MAPS)


def test_a_deleted_polygon_may_be_anything(tmp_path):
    broken = [{**item, "deleted": 1} for item in BROKEN_OBJECTS.values()]
    broken = [item for item in broken if item["polygon"] not in ([1, 2, 3], [[1], [2], [3]])]
    write_polygons(polygon_file(tmp_path), [GOOD, *broken])
    assert prepare_cityscapes(tmp_path, workers=1) == (3, 0)


def test_wrong_folders_are_told(tmp_path, capsys):
    assert main(["--root", str(tmp_path)]) == 1
    assert f"{tmp_path} has no folder gtFine" in capsys.readouterr().err
    (tmp_path / "cityscapes" / "gtFine").mkdir(parents=True)
    assert main(["--root", str(tmp_path)]) == 1
    assert f"did you mean {tmp_path / 'cityscapes'}?" in capsys.readouterr().err
    assert main(["--root", str(tmp_path / "cityscapes")]) == 1
    assert "_gtFine_polygons.json: unpack" in capsys.readouterr().err
    assert main(["--root", str(tmp_path), "--workers", "0"]) == 2
    assert "--workers is 0" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    write_polygons(polygon_file(tmp_path), scene("street"))
    target = label_file(tmp_path, "_labelIds.png")
    Path(f"{target}.tmp").mkdir()
    with pytest.raises(UserError, match=f"{target} cannot be written"):
        prepare_cityscapes(tmp_path, workers=1)


def die(annotation):
    os._exit(9)


def test_a_killed_process_is_told(tmp_path, monkeypatch):
    write_polygons(polygon_file(tmp_path), scene("street"))
    monkeypatch.setitem(preparation.LABEL_MAPS, "_labelIds.png", die)
    with pytest.raises(UserError, match="a process was killed"):
        prepare_cityscapes(tmp_path, workers=1)


# --- the command ---------------------------------------------------------------------------------


def test_default_folder_is_detectron2s(monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert default_root() == Path("datasets/cityscapes")
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/data")
    assert default_root() == Path.home() / "data" / "cityscapes"


def test_the_command_shows_progress_and_says_what_it_did(tmp_path):
    write_polygons(polygon_file(tmp_path / "cityscapes"), scene("street"))
    command = [sys.executable, str(REPOSITORY / "tools" / "prepare_cityscapes.py")]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    for counts in ((3, 0), (0, 3)):
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "{} label files written, {} already existed\n".format(*counts)
        assert "1/1" in done.stderr and "Warning" not in done.stderr
    assert os.listdir(tmp_path) == ["cityscapes"]
