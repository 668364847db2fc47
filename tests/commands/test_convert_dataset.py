"""Tests conversions of VOC XML and YOLO text to COCO: equal to the drawn set, no silent losses."""

import json
import unicodedata
from pathlib import Path

import globox
import pytest
from conftest import REPOSITORY
from PIL import Image, ImageDraw

from contnet.commands.convert_dataset import main
from contnet.commands.doctor import main as doctor
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.launch.arguments import configure

SIZES = [(120, 80), (64, 100), (90, 90)]
# Class and corners in whole pixels, for each image; the last image has no objects.
OBJECTS = [
    [("cat", (10, 20, 50, 60)), ("dog", (0, 0, 120, 80))],
    [("dog", (5, 30, 40, 100))],
    [],
]
NAMES = ["dog", "cat", "bird"]


def draw(folder: Path, name: str, size: tuple[int, int], boxes=(), **options) -> Path:
    image = Image.new("RGB", size, "white")
    for _, box in boxes:
        ImageDraw.Draw(image).rectangle(box, fill="red")
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, **options)
    return folder / name


def xml(name: str, size, objects, more="", flags="") -> str:
    items = "".join(
        f"<object><name>{label}</name>{flags}<bndbox><ymin>{y0}</ymin><xmin>{x0}</xmin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for label, (x0, y0, x1, y1) in objects
    )
    stated = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    head = f"<filename>{name}</filename>" + (stated if size else "")
    return f"<annotation>{head}{more}{items}</annotation>"


def lines(size, objects) -> str:
    width, height = size
    rows = [
        (
            NAMES.index(label),
            (x0 + x1) / 2 / width,
            (y0 + y1) / 2 / height,
            (x1 - x0) / width,
            (y1 - y0) / height,
        )
        for label, (x0, y0, x1, y1) in objects
    ]
    return "".join(" ".join(map(str, row)) + "\n" for row in rows)


@pytest.fixture
def voc(tmp_path) -> Path:
    root = tmp_path / "voc"
    (root / "Annotations").mkdir(parents=True)
    for number, (size, objects) in enumerate(zip(SIZES, OBJECTS, strict=True)):
        draw(root / "JPEGImages", f"{number}.jpg", size, objects)
        text = xml(f"{number}.jpg", size, objects)
        (root / "Annotations" / f"{number}.xml").write_text(text)
    return root


@pytest.fixture
def yolo(tmp_path) -> Path:
    root = tmp_path / "yolo"
    for number, (size, objects) in enumerate(zip(SIZES, OBJECTS, strict=True)):
        split = "train" if number != 1 else "val"
        draw(root / "images" / split, f"{number}.jpg", size, objects)
        (root / "labels" / split).mkdir(parents=True, exist_ok=True)
        (root / "labels" / split / f"{number}.txt").write_text(lines(size, objects))
    text = f"path: /content/elsewhere\ntrain: images/train\nval: images/val\nnames: {NAMES}\n"
    (root / "data.yaml").write_text(text)
    return root


@pytest.fixture
def convert(tmp_path, capsys):
    """Runs the tool; returns its status, the content of the file, and its output."""

    def run(*arguments: object) -> tuple[int, dict, str]:
        out = tmp_path / "out" / "set.json"
        form, folder, *options = map(str, arguments)
        status = main([form, folder, str(out), "--force", *options])
        printed = capsys.readouterr()
        content = json.loads(out.read_text()) if out.exists() else {}
        return status, content, printed.out + printed.err

    return run


def found(content: dict) -> dict[str, list]:
    """Returns class and box of every object, by the last part of its image's name."""
    names = {each["id"]: each["name"] for each in content["categories"]}
    images = {each["id"]: Path(each["file_name"]).name for each in content["images"]}
    objects = {name: [] for name in images.values()}
    for each in content["annotations"]:
        x, y, w, h = (round(value, 4) for value in each["bbox"])
        box = (x, y, round(x + w, 4), round(y + h, 4))
        objects[images[each["image_id"]]].append((names[each["category_id"]], box))
    return objects


TRUTH = {f"{number}.jpg": objects for number, objects in enumerate(OBJECTS)}


def check_form(content: dict) -> None:
    sizes = {
        Path(each["file_name"]).name: (each["width"], each["height"]) for each in content["images"]
    }
    assert sizes == {f"{number}.jpg": size for number, size in enumerate(SIZES)}
    assert [each["id"] for each in content["images"]] == [1, 2, 3]
    assert [each["id"] for each in content["annotations"]] == [1, 2, 3]
    assert all(each["iscrowd"] == 0 for each in content["annotations"])
    areas = sorted(round(each["area"], 3) for each in content["annotations"])
    assert areas == [40 * 40, 35 * 70, 120 * 80]


@pytest.mark.parametrize("place", [".", "Annotations"])
def test_voc_is_what_was_drawn(voc, convert, place):
    status, content, said = convert("voc", voc / place)
    assert (status, found(content)) == (0, TRUTH)
    check_form(content)
    assert [each["name"] for each in content["categories"]] == ["cat", "dog"]
    assert "3 images (1 without objects), 3 objects, 2 classes" in said


@pytest.mark.parametrize("place", [".", "labels", "images"])
def test_yolo_is_what_was_drawn(yolo, convert, place):
    status, content, _ = convert("yolo", yolo / place)
    assert (status, found(content)) == (0, TRUTH)
    content["images"].sort(key=lambda each: Path(each["file_name"]).name)
    assert {each["name"]: each["id"] for each in content["categories"]} == {
        "dog": 1,
        "cat": 2,
        "bird": 3,
    }


def test_yolo_in_one_folder(tmp_path, convert):
    """The layout of darknet and labelImg: labels beside images, names in classes.txt."""
    root = tmp_path / "flat"
    for number, (size, objects) in enumerate(zip(SIZES, OBJECTS, strict=True)):
        draw(root, f"{number}.jpg", size, objects)
        (root / f"{number}.txt").write_text(lines(size, objects))
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n\n")
    status, content, _ = convert("yolo", root)
    assert (status, found(content)) == (0, TRUTH)
    check_form(content)


@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_the_doctor_and_the_loader_take_it(form, request, convert, tmp_path, capsys):
    root = request.getfixturevalue(form)
    _, _, said = convert(form, root)
    folder = root / "JPEGImages" if form == "voc" else root
    config = str(REPOSITORY / "configs" / "quick" / "faster_rcnn.yaml")
    sets = str([["mine_train", str(tmp_path / "out/set.json"), str(folder)]])
    options = ["DATASETS.REGISTER", sets, "DATASETS.TEST", "('mine_train',)"]
    assert doctor(["--config-file", config, "--workers", "1", *options]) == 0
    assert "0 errors" in capsys.readouterr().out
    cfg, _ = configure(config, options)
    records = load_dataset_dicts(cfg, ["mine_train"], train=True)
    assert sorted(len(record["annotations"]) for record in records) == [1, 2]
    assert f"['mine_set', '{tmp_path / 'out/set.json'}', " in said


@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_boxes_are_globoxs(form, request, convert):
    """The boxes are the same in all files that globox can read."""
    root = request.getfixturevalue(form)
    _, content, _ = convert(form, root)
    if form == "voc":
        theirs = list(globox.AnnotationSet.from_pascal_voc(root / "Annotations"))
    else:
        theirs = [
            each
            for split in ("train", "val")
            for each in globox.AnnotationSet.from_yolo_v5(
                root / "labels" / split, image_folder=root / "images" / split
            )
        ]
    names = {str(number): name for number, name in enumerate(NAMES)}
    boxes = {
        each.image_id: [(names.get(box.label, box.label), box.ltrb) for box in each.boxes]
        for each in theirs
    }
    ours = found(content)
    assert boxes.keys() == ours.keys()
    for name, objects in ours.items():
        assert [label for label, _ in objects] == [label for label, _ in boxes[name]]
        for (_, one), (_, other) in zip(objects, boxes[name], strict=True):
            assert one == pytest.approx(other, abs=1e-3)


# --- splits --------------------------------------------------------------------------------------


def test_splits_of_voc_have_the_same_classes(voc, convert):
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    (voc / "ImageSets" / "Main" / "val.txt").write_text("1\n2\n\n")
    (voc / "ImageSets" / "Main" / "dog_val.txt").write_text("1  1\n2 -1\n")
    for split in ("val", "dog_val", voc / "ImageSets/Main/val.txt"):
        status, content, _ = convert("voc", voc, "--split", split)
        assert (status, found(content)) == (0, {"1.jpg": OBJECTS[1], "2.jpg": []})
        assert [each["name"] for each in content["categories"]] == ["cat", "dog"]
    (voc / "ImageSets" / "Main" / "val.txt").write_text("1\nlost\n")
    status, content, said = convert("voc", voc, "--split", "val")
    assert status == 1 and "lost" in said and len(content["images"]) == 1
    status, _, said = convert("voc", voc, "--split", "test")
    assert status == 1 and "dog_val, val" in said


@pytest.mark.parametrize(
    ("value", "split"),
    [
        ("images/val", "val"),
        ("../images/val", "val"),
        ("[images/val]", "val"),
        ("/content/mine/images/val", "valid"),
        ("lists/val.txt", "val"),
        ("lists/windows.txt", "val"),
    ],
)
def test_splits_of_yolo(yolo, convert, value, split):
    (yolo / "lists").mkdir()
    (yolo / "lists" / "val.txt").write_text("./images/val/1.jpg\n")
    (yolo / "lists" / "windows.txt").write_text("C:\\data\\images\\val\\1.jpg\r\n")
    (yolo / "data.yaml").write_text(f"train: images/train\nval: {value}\nnames: {NAMES}\n")
    status, content, _ = convert("yolo", yolo, "--split", split)
    assert (status, found(content)) == (0, {"1.jpg": OBJECTS[1]})
    assert [each["file_name"] for each in content["images"]] == ["images/val/1.jpg"]


def test_roboflows_folders(tmp_path, convert):
    root = tmp_path / "robo"
    for split in ("train", "valid"):
        draw(root / split / "images", f"{split}.jpg", SIZES[0], OBJECTS[0])
        (root / split / "labels").mkdir()
        (root / split / "labels" / f"{split}.txt").write_text(lines(SIZES[0], OBJECTS[0]))
    (root / "README.roboflow.txt").write_text("Exported on 1 May\n")
    text = "train: ../train/images\nval: ../valid/images\nnames: {1: cat, 0: dog, 2: bird}\n"
    (root / "data.yaml").write_text(text)
    status, content, _ = convert("yolo", root, "--split", "val")
    assert (status, found(content)) == (0, {"valid.jpg": OBJECTS[0]})
    status, content, _ = convert("yolo", root)
    assert status == 0 and len(content["images"]) == 2


# --- variants of the files -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "options", "box"),
    [
        ("", [], (10, 20, 50, 60)),
        ("", ["--first-pixel", "1"], (9, 19, 50, 60)),
        ("<source><annotation>PASCAL VOC2007</annotation></source>", [], (9, 19, 50, 60)),
        (
            "<source><annotation>PASCAL VOC2007</annotation></source>",
            ["--first-pixel", "0"],
            (10, 20, 50, 60),
        ),
    ],
)
def test_the_first_pixel_of_voc(voc, convert, more, options, box):
    text = xml("0.jpg", SIZES[0], OBJECTS[0][:1], more)
    (voc / "Annotations" / "0.xml").write_text(text)
    _, content, _ = convert("voc", voc, *options)
    assert found(content)["0.jpg"] == [("cat", box)]


@pytest.mark.parametrize(
    ("image", "named"),
    [
        ("0.JPG", "0.jpg"),
        ("0.png", "0.jpg"),
        ("0.jpg", "C:\\Users\\me\\0.jpg"),
        ("0.jpg", "/home/me/0.jpg"),
        ("0.jpg", "0"),
        ("0.jpg", "stale.jpg"),
        ("other.jpg", "other.jpg"),
        ("0.jfif", "0.jfif"),
        (unicodedata.normalize("NFD", "é.jpg"), unicodedata.normalize("NFC", "é.jpg")),
    ],
)
def test_images_are_found_by_other_names(voc, convert, image, named):
    (voc / "JPEGImages" / "0.jpg").rename(voc / "JPEGImages" / "x.tmp")
    options = {"format": "JPEG"} if image.endswith("jfif") else {}
    draw(voc / "JPEGImages", image, SIZES[0], OBJECTS[0], **options)
    draw(voc / "JPEGImages", "._0.jpg", SIZES[0])
    (voc / "Annotations" / "0.xml").write_text(xml(named, SIZES[0], OBJECTS[0]))
    status, content, _ = convert("voc", voc)
    assert status == 0 and found(content)[image] == OBJECTS[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "iso-8859-1", "gbk", "big5"])
def test_names_of_classes_in_any_encoding(voc, convert, encoding):
    name = "é" if "8" in encoding else "牛"
    stated = encoding.removesuffix("-sig")
    text = f"<?xml version='1.0' encoding='{stated}'?>" + xml("0.jpg", SIZES[0], OBJECTS[0])
    text = text.replace("<name>cat", f"<name>{name}")
    (voc / "Annotations" / "0.xml").write_bytes(text.encode(encoding))
    status, content, said = convert("voc", voc)
    assert status == 0, said
    assert found(content)["0.jpg"] == [(name, OBJECTS[0][0][1]), OBJECTS[0][1]]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_images_that_exif_turns(voc, convert, orientation):
    """Sizes are those of the upright image; boxes for the stored image are rotated with it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = draw(voc / "JPEGImages", "0.jpg", SIZES[0], exif=exif)
    _, content, _ = convert("voc", voc)
    (image,) = (each for each in content["images"] if each["file_name"] == "0.jpg")
    expected = {6: (20, 10, 60, 50), 8: (20, 70, 60, 110)}.get(orientation, (10, 20, 50, 60))
    assert (image["width"], image["height"]) == (SIZES[0] if orientation < 5 else SIZES[0][::-1])
    assert found(content)["0.jpg"][0][1] == expected
    assert path.exists()


@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_images_larger_than_pillows_limit_are_taken(form, request, convert, monkeypatch):
    """As in training with INPUT.MAX_PIXELS 0."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    status, content, said = convert(form, request.getfixturevalue(form))
    assert status == 0, said
    check_form(content)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_annotations_and_lists_in_another_form_of_unicode(form, request, convert, forms, split):
    root = request.getfixturevalue(form)
    names = [unicodedata.normalize(each, "é0") for each in forms]
    for file in list(root.rglob("0.*")):
        name = names[file.suffix != ".jpg"]
        file.rename(file.with_name(name + file.suffix))
    listed = root / "list.txt"
    listed.write_text("É0.JPG\n1.jpg\n2.jpg\n".replace("É", unicodedata.normalize(forms[0], "É")))
    status, content, said = convert(form, root, *(["--split", listed] if split else []))
    assert status == 0, said
    assert found(content)[names[0] + ".jpg"] == OBJECTS[0]


def test_polygons_become_masks(yolo, convert):
    text = "1 0.25 0.25 0.75 0.25 0.75 0.5\n0 0.5 0.5 0.5 0.5\n\n"
    (yolo / "labels" / "val" / "1.txt").write_text(text)
    status, content, _ = convert("yolo", yolo, "--split", "val")
    polygon, box = content["annotations"]
    assert status == 0 and "segmentation" not in box
    assert polygon["segmentation"] == [[16, 25, 48, 25, 48, 50]]
    assert (polygon["bbox"], polygon["area"]) == ([16, 25, 32, 25], 400)


def test_polygons_of_voc(voc, convert):
    corners = {"x1": 10, "y1": 20, "x2": 50, "y2": 20, "x3": 50, "y3": 60}
    inner = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
    item = f"<object><name>cat</name><polygon>{inner}</polygon></object>"
    (voc / "Annotations" / "0.xml").write_text(xml("0.jpg", SIZES[0], [], item))
    _, content, _ = convert("voc", voc)
    (annotation,) = (each for each in content["annotations"] if each["image_id"] == 1)
    assert annotation["segmentation"] == [[10, 20, 50, 20, 50, 60]]
    assert annotation["area"] == 800


def test_flags_are_kept(voc, convert):
    flags = "<truncated>1</truncated><difficult>1</difficult>"
    text = xml("0.jpg", SIZES[0], OBJECTS[0], flags=flags)
    (voc / "Annotations" / "0.xml").write_text(text)
    status, content, said = convert("voc", voc)
    assert status == 0 and "marked difficult, kept: 2" in said
    marked = [each for each in content["annotations"] if each.get("difficult")]
    assert len(marked) == 2 and all(each["truncated"] == 1 for each in marked)
    status, content, said = convert("voc", voc, "--skip-difficult")
    assert status == 0 and len(content["annotations"]) == 1 and "0 images, 2 objects" in said


def test_keypoints_and_confidences(yolo, convert):
    text = (yolo / "data.yaml").read_text() + "kpt_shape: [2, 3]\n"
    (yolo / "data.yaml").write_text(text)
    rows = "0 0.5 0.5 0.5 0.5 0.1 0.1 2 0.2 0.2 1\n1.0 0.5 0.5 0.25 0.5 0.9\n"
    (yolo / "labels" / "val" / "1.txt").write_text("\ufeff" + rows)
    status, content, said = convert("yolo", yolo, "--split", "val")
    assert status == 0 and "keypoints" in said and "sixth" in said
    assert found(content)["1.jpg"] == [("dog", (16, 25, 48, 75)), ("cat", (24, 25, 40, 75))]


# --- what cannot be converted --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "objects", "images"),
    [
        ("<annotation><object>", 1, 2),
        ("", 1, 2),
        ("<annotations><image/></annotations>", 1, 2),
        (xml("0.jpg", (240, 160), OBJECTS[0]), 1, 2),
        (xml("0.jpg", SIZES[0], [("cat", ("a", 1, 2, 3)), OBJECTS[0][1]]), 2, 3),
        (xml("0.jpg", SIZES[0], [("cat", ("nan", 1, 2, 3)), OBJECTS[0][1]]), 2, 3),
        (xml("0.jpg", SIZES[0], [("cat", (10, 10, 10, 30)), OBJECTS[0][1]]), 2, 3),
        (xml("0.jpg", SIZES[0], [("cat", (130, 10, 150, 30)), OBJECTS[0][1]]), 2, 3),
        (xml("0.jpg", SIZES[0], [("", (1, 1, 9, 9)), OBJECTS[0][1]]), 2, 3),
        (xml("0.jpg", SIZES[0], OBJECTS[0][1:], "<object><name>cat</name></object>"), 2, 3),
    ],
)
def test_damage_in_voc_is_counted(voc, convert, text, objects, images):
    (voc / "Annotations" / "0.xml").write_text(text)
    status, content, said = convert("voc", voc)
    assert (status, len(content["annotations"]), len(content["images"])) == (1, objects, images)
    assert "0.xml" in said
    assert convert("voc", voc, "--skip")[0] == 0


@pytest.mark.parametrize("form", ["voc", "yolo"])
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_images_that_cannot_be_used(form, damage, request, convert):
    root = request.getfixturevalue(form)
    image = next(root.rglob("0.jpg"))
    image.write_bytes(b"none") if damage == "damaged" else image.unlink()
    status, content, said = convert(form, root)
    assert (status, len(content["images"]), len(content["annotations"])) == (1, 2, 1)
    assert "left out  1 image, 2 objects" in said


@pytest.mark.parametrize(
    "line",
    [
        "3 0.5 0.5 0.1 0.1",
        "-1 0.5 0.5 0.1 0.1",
        "0.5 0.5 0.5 0.1 0.1",
        "cat 0.5 0.5 0.1 0.1",
        "0 0.5 0.5 0.1",
        "0 0.5 0,5 0.1 0.1",
        "0 0.5 nan 0.1 0.1",
        "0 32 50 10 10",
        "0 0.5 0.5 0 0.1",
        "0 0.1 0.1 0.2 0.2 0.3 0.3 0.4",
        "0 0.1 0.1 0.2 0.2 0.3 0.3",
    ],
)
def test_damage_in_yolo_is_counted(yolo, convert, line):
    (yolo / "labels" / "val" / "1.txt").write_text(f"{line}\n{lines(SIZES[1], OBJECTS[1])}")
    status, content, said = convert("yolo", yolo, "--split", "val")
    assert (status, found(content)) == (1, {"1.jpg": OBJECTS[1]})
    assert "1.txt, line 1" in said and "left out  0 images, 1 object" in said


def test_what_is_put_right_is_said(voc, convert):
    objects = [("cat", (50, 60, 10, 20)), ("dog", (-5, 0, 125, 80))]
    (voc / "Annotations" / "0.xml").write_text(xml("0.jpg", SIZES[0], objects))
    status, content, said = convert("voc", voc)
    assert (status, found(content)) == (0, TRUTH)
    assert "boxes with swapped corners, corrected: 1" in said and "cut at the edge" in said


def test_images_without_labels_are_said(voc, yolo, convert):
    (yolo / "labels" / "val" / "1.txt").unlink()
    status, content, said = convert("yolo", yolo)
    assert (status, len(content["images"])) == (0, 3) and "without a label file" in said
    (voc / "Annotations" / "1.xml").unlink()
    status, content, said = convert("voc", voc)
    assert (status, len(content["images"])) == (0, 2) and "images without an XML file" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["voc", "nowhere", "a.json"], "nowhere is not a folder"),
        (["voc", "empty", "a.json"], "no XML files"),
        (["yolo", "empty", "a.json"], "no class names"),
        (["voc", "voc", "a.txt"], ".json"),
        (["voc", "voc", "there.json"], "--force"),
        (["voc", "voc", "a.json", "--images", "empty"], "no image could be converted"),
        (["yolo", "yolo", "a.json", "--names", "none.txt"], "none.txt does not exist"),
        (["yolo", "yolo", "a.json", "--names", "twice.txt"], "twice"),
        (["yolo", "yolo", "a.json", "--names", "bad.yaml"], "names"),
        (["yolo", "yolo", "a.json", "--split", "test"], "train, val"),
    ],
)
def test_mistakes_are_one_line(voc, yolo, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.json").write_text("mine")
    (tmp_path / "twice.txt").write_text("cat\ncat\n")
    (tmp_path / "bad.yaml").write_text("names: 7\n")
    assert main(arguments) == (2 if words == ".json" else 1)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert (tmp_path / "there.json").read_text() == "mine"
    assert not (tmp_path / "a.json").exists()


def test_names_of_voc_may_be_given(voc, tmp_path, convert):
    (tmp_path / "names.txt").write_text("dog\nbird\n")
    status, content, said = convert("voc", voc, "--names", tmp_path / "names.txt")
    assert status == 1 and "whose class is not in the list of names: 1" in said
    assert [(each["id"], each["name"]) for each in content["categories"]] == [
        (1, "dog"),
        (2, "bird"),
    ]
    assert len(content["annotations"]) == 2
