"""Tests tools/predict.py: its inputs, files and output."""

import io
import json
import re
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from untrained import NAMES, save_untrained

import contnet
from contnet.commands.predict import main


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Makes files of untrained models by name, once each."""
    made = {}

    def find(name: str) -> str:
        if name not in made:
            made[name] = str(save_untrained(tmp_path_factory.mktemp("model"), name))
        return made[name]

    return find


def save(path, height=60, width=90, mode="RGB"):
    """Saves an image of noise, which is always the same for a size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def rows_of(folder):
    return json.loads((folder / "predictions.json").read_text())


def test_all_that_can_be_given(models, tmp_path, monkeypatch, capsys):
    save(tmp_path / "folder" / "a.png")
    save(tmp_path / "folder" / "below" / "a.jpg", 70)
    save(tmp_path / "folder" / ".hidden.png")
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    save(tmp_path / "one.bmp", 50)
    save(tmp_path / "pattern" / "x.webp")
    save(tmp_path / "pattern" / "y.png")
    save(tmp_path / "piped.png")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{tmp_path}/piped.png\n\n"))
    out = tmp_path / "out"
    given = ["folder", "one.bmp", "pattern/*.[wp]*"]
    given = [str(tmp_path / each) for each in given]
    assert (
        main([models("retinanet_contti"), *given, "-", "--output", str(out), "--score", "0"]) == 0
    )
    images = ["a.png", "below/a.jpg", "one.bmp", "x.webp", "y.png", "piped.png"]
    rows = rows_of(out)
    assert list(dict.fromkeys(row["image_id"] for row in rows)) == images
    assert len(rows) == 5 * len(images) and {row["category_name"] for row in rows} <= set(NAMES)
    drawn = sorted(str(path.relative_to(out / "images")) for path in (out / "images").rglob("*.*"))
    assert drawn == ["a.jpg", "below/a.jpg", "one.jpg", "piped.jpg", "x.jpg", "y.jpg"]
    page = (out / "index.html").read_text()
    assert sorted(re.findall('href="(images/[^"]+)"', page)) == [f"images/{each}" for each in drawn]
    assert "6 images" in capsys.readouterr().out
    # The predictions of the same model in Python.
    found = contnet.load_run(models("retinanet_contti"))(tmp_path / "one.bmp")
    ours = [row for row in rows if row["image_id"] == "one.bmp"]
    assert [row["score"] for row in ours] == pytest.approx(found["scores"], abs=1e-4)
    x0, y0, x1, y1 = found["boxes"][0].tolist()
    assert ours[0]["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.02)


def test_a_coco_file_without_truth(models, tmp_path):
    """pycocotools reads the results, whose ids are those of the file."""
    names = ["sub/a.png", "b.png"]
    images = [
        {"id": 7 * number, "file_name": name, "height": 60, "width": 90}
        for number, name in enumerate(names, 1)
    ]
    for name in names:
        save(tmp_path / "pictures" / name)
    categories = [
        {"id": number, "name": name} for number, name in zip((30, 10, 20), NAMES, strict=True)
    ]
    file = tmp_path / "test-dev.json"
    file.write_text(json.dumps({"images": images, "categories": categories}))
    out = tmp_path / "out"
    options = ["--image-root", str(tmp_path / "pictures"), "--output", str(out), "--score", "0"]
    assert main([models("mask_rcnn_contti"), str(file), *options]) == 0
    truth = COCO()
    truth.dataset = {"images": images, "categories": categories, "annotations": []}
    truth.createIndex()
    results = truth.loadRes(str(out / "predictions.json"))
    assert set(results.getImgIds()) == {7, 14} and len(results.anns) == 10
    for row in results.anns.values():
        assert categories[NAMES.index(row["category_name"])]["id"] == row["category_id"]
        assert results.annToMask(row).shape == (60, 90)
    file.write_text(json.dumps({"images": images, "categories": categories[:2]}))
    assert main([models("mask_rcnn_contti"), str(file), *options]) == 2


def test_what_cannot_be_read_is_left_out(models, tmp_path, capsys):
    folder, out = tmp_path / "folder", tmp_path / "out"
    for name in "acd":
        save(folder / f"{name}.png")
    data = (folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(data[: len(data) // 2])
    (folder / "b.mp4").write_bytes(b"no video")
    arguments = [models("retinanet_contti"), str(folder), "--output", str(out), "--score", "0"]
    assert main([*arguments, "--batch", "2"]) == 1
    said = capsys.readouterr().err
    assert "2 of 4 files" in said and "b.mp4" in said and "c.png" in said
    assert [row["image_id"] for row in rows_of(out)[::5]] == ["a.png", "d.png"]


def test_a_video(models, tmp_path):
    path, out = tmp_path / "film.avi", tmp_path / "out"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 12.0, (96, 64))
    for number in range(3):
        writer.write(np.full((64, 96, 3), 80 * number, np.uint8))
    writer.release()
    arguments = [models("retinanet_contti"), str(path), "--output", str(out), "--score", "0"]
    assert main(arguments) == 0
    ids = list(dict.fromkeys(row["image_id"] for row in rows_of(out)))
    assert ids == ["film.avi#0", "film.avi#1", "film.avi#2"]
    drawn = cv2.VideoCapture(str(out / "videos" / "film.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert drawn.get(cv2.CAP_PROP_FPS) == pytest.approx(12)


def test_a_video_that_was_cut(models, tmp_path, capsys):
    frames = [np.random.default_rng(k).integers(0, 256, (64, 96, 3), np.uint8) for k in range(20)]
    writer = cv2.VideoWriter(
        str(tmp_path / "whole.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 12.0, (96, 64)
    )
    for frame in frames:
        writer.write(frame)
    writer.release()
    data = (tmp_path / "whole.avi").read_bytes()
    path, out = tmp_path / "film.avi", tmp_path / "out"
    path.write_bytes(data[: len(data) // 2])
    assert main([models("retinanet_contti"), str(path), "--output", str(out), "--no-pictures"]) == 1
    assert "film.avi" in capsys.readouterr().err


def test_maps_and_classes(models, tmp_path):
    image, maps, classes = save(tmp_path / "a.png"), tmp_path / "maps", tmp_path / "classes"
    assert main([models("cityscapes/pspnet_contti"), str(image), "--output", str(maps)]) == 0
    (row,) = rows_of(maps)
    found = np.asarray(Image.open(maps / row["map"]))
    assert found.shape == (60, 90) and found.max() < 3
    shares = {NAMES[number]: (found == number).mean() for number in np.unique(found)}
    assert row["classes"] == pytest.approx(shares, abs=1e-4)
    assert main([models("imagenet/contti_strong"), str(image), "--output", str(classes)]) == 0
    (row,) = rows_of(classes)
    assert {each["category_name"] for each in row["classes"]} == set(NAMES)
    assert sum(each["score"] for each in row["classes"]) == pytest.approx(1, abs=1e-3)
    for folder in (maps, classes):
        assert Image.open(folder / "images" / "a.jpg").size[0] >= 480  # large enough to be read


def test_classes_and_scores(models, tmp_path, capsys):
    image, out = str(save(tmp_path / "a.png")), tmp_path / "out"
    arguments = [models("retinanet_contti"), image, "--output", str(out), "--no-pictures"]
    assert main([*arguments, "--score", "0"]) == 0
    every = rows_of(out)
    wanted = every[0]["category_name"]
    assert main([*arguments, "--score", "0", "--classes", wanted]) == 0
    assert rows_of(out) == [row for row in every if row["category_name"] == wanted]
    assert main([*arguments, "--score", "1"]) == 0
    assert rows_of(out) == [] and not (out / "images").exists()
    assert main([*arguments, "--classes", "boxx"]) == 2
    assert "'box'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["absent.png"], ["empty"], ["a.png", "--score", "2"], ["a.png", "--tile", "4", "0"]],
    ids=["no file", "an empty folder", "a score", "tiles"],
)
def test_mistakes(models, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    assert main([models("retinanet_contti"), *words, "--output", "out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.long
def test_two_processes(models, tmp_path):
    for number in range(5):
        save(tmp_path / "folder" / f"{number}.png", 50 + number)
    shutil.copy(tmp_path / "folder" / "3.png", tmp_path / "folder" / "same.png")
    arguments = [models("retinanet_contti"), str(tmp_path / "folder"), "--score", "0"]
    arguments += ["--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path / "one")]) == 0
    assert main([*arguments, "--output", str(tmp_path / "two"), "--num-gpus", "2"]) == 0
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")
    for folder in ("one", "two"):
        assert len(list((tmp_path / folder / "images").iterdir())) == 6
