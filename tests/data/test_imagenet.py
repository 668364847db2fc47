"""Data of image classification: layouts, label files, registration, pixels, checks, the doctor."""

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import REPOSITORY
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from imagenet import class_name, draw_picture, make_imagenet
from PIL import Image
from torchvision.datasets import ImageFolder

from contnet.commands.doctor import main as doctor
from contnet.config import load_config
from contnet.data.datasets.classification import read_set
from contnet.data.datasets.register import register_datasets
from contnet.data.datasets.shard_writer import make_shards
from contnet.data.findings import NOTE, Findings
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.images import read_image
from contnet.data.pipeline.loader import build_train_loader
from contnet.data.validation.classes import count_classes
from contnet.data.validation.dataset import check_datasets
from contnet.launch.arguments import configure, parse_arguments
from contnet.launch.main import main
from contnet.utils.errors import UserError
from contnet.utils.text import describe_difference

LEAF = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
DETECTOR = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
KEY = "MODEL.CLASSIFIER.NUM_CLASSES"
NAMES = ("imagenet_train", "imagenet_val")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
pytestmark = pytest.mark.usefixtures("forget_datasets")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    return make_imagenet(tmp_path_factory.mktemp("drawn"), train=3, val=2)


@pytest.fixture
def root(drawn, tmp_path, monkeypatch) -> Path:
    """A copy of the drawn set that may be damaged, where DETECTRON2_DATASETS points."""
    shutil.copytree(drawn / "imagenet", tmp_path / "imagenet")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


def config(*options: str) -> CfgNode:
    command = ["--config-file", LEAF, *options]
    if KEY not in options and "DATASETS.REGISTER" not in options:
        command += [KEY, "3"]
    return configure(parse_arguments(command))


def load(cfg: CfgNode, name: str) -> list[dict]:
    check_datasets(cfg, [name])
    return load_dataset_dicts(cfg, [name], train=True)


def flatten(root: Path) -> dict[str, str]:
    """Makes val a flat folder with ImageNet's names; the class of each image."""
    val = root / "imagenet" / "val"
    files = sorted(val.glob("*/*.JPEG"), key=lambda path: (path.stem, path.parent.name))
    classes = {}
    for number, file in enumerate(files, 1):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        classes[name] = file.parent.name
        file.rename(val / name)
    for folder in val.iterdir():
        if folder.is_dir():
            folder.rmdir()
    return classes


def write_meta(file: Path, numbers: dict[int, str]) -> None:
    """A meta.mat as the development kit's: leaves, and a class above them."""
    rows = [(number, name, "words", "gloss", 0) for number, name in numbers.items()]
    rows.append((len(rows) + 1, "n99999999", "entity", "all", len(rows)))
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O")]
    synsets = np.array(rows, dtype=[*kinds, ("num_children", "O")]).reshape(-1, 1)
    scipy.io.savemat(file, {"synsets": synsets})


# Not the order of the names.
NUMBERS = {1: class_name(2), 2: class_name(0), 3: class_name(1)}


def official(root: Path, classes: dict[str, str], folder: str = "") -> None:
    kit = root / "imagenet" / folder
    kit.mkdir(parents=True, exist_ok=True)
    numbers = {name: number for number, name in NUMBERS.items()}
    lines = [str(numbers[classes[name]]) for name in sorted(classes)]
    (kit / GROUND_TRUTH).write_text("\n".join(lines) + "\n")
    write_meta(kit / "meta.mat", NUMBERS)


def kaggle(root: Path, classes: dict[str, str]) -> None:
    with open(root / "imagenet" / "LOC_val_solution.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for name, wnid in reversed(classes.items()):
            writer.writerow([name.removesuffix(".JPEG"), f"{wnid} 85 1 499 272 {wnid} 1 2 3 4 "])


def lines(root: Path, classes: dict[str, str]) -> None:
    text = "".join(f"{name} {wnid}\n" for name, wnid in reversed(classes.items()))
    (root / "imagenet" / "val_labels.txt").write_text(text)


def table(root: Path, classes: dict[str, str]) -> None:
    rows = "".join(f"{name},{wnid}\n" for name, wnid in classes.items())
    (root / "imagenet" / "val_labels.csv").write_text(f"file,class\n{rows}")


LABELS = {
    "official": official,
    "official in the kit": lambda root, classes: official(
        root, classes, "ILSVRC2012_devkit_t12/data"
    ),
    "Kaggle": kaggle,
    "lines": lines,
    "table": table,
}


# --- layouts -------------------------------------------------------------------------------------


def test_class_folders_are_those_of_image_folder(root):
    train = root / "imagenet" / "train"
    first = train / class_name(0)
    for name in ("a/x.png", "a-b/y.PNG", "a/c/z.webp", "B.jpg", "_.Jpeg"):
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(first / name)
    (first / "notes.txt").write_text("no image")
    expected = ImageFolder(str(train))
    records = load(config(), "imagenet_train")
    assert [(r["file_name"], r["label"]) for r in records] == expected.samples
    assert [r["image_id"] for r in records] == [
        os.path.relpath(path, train) for path, _ in expected.samples
    ]
    metadata = MetadataCatalog.get("imagenet_train")
    assert metadata.thing_classes == expected.classes
    assert metadata.evaluator_type == "classification"
    assert metadata.image_dir == str(train)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("train_is_there", [True, False])
def test_flat_folders(root, kind, train_is_there):
    classes = flatten(root)
    LABELS[kind](root, classes)
    if not train_is_there:
        shutil.rmtree(root / "imagenet" / "train")
    records = load(config(), "imagenet_val")
    names = [class_name(label) for label in range(3)]
    assert {r["image_id"]: names[r["label"]] for r in records} == classes
    assert all(r["file_name"].endswith(r["image_id"]) for r in records)
    metadata = MetadataCatalog.get("imagenet_val")
    assert metadata.thing_classes == names
    assert os.path.isfile(metadata.label_file)


def test_a_byte_order_mark_is_no_part_of_the_first_line(root):
    classes = flatten(root)
    kaggle(root, classes)
    file = root / "imagenet" / "LOC_val_solution.csv"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    shutil.rmtree(root / "imagenet" / "train")
    labels = {r["image_id"]: r["label"] for r in load(config(), "imagenet_val")}
    names = sorted(set(classes.values()))
    assert labels == {image: names.index(name) for image, name in classes.items()}
    assert MetadataCatalog.get("imagenet_val").thing_classes == names


def test_shards_without_names_beside_named_classes_are_refused(root):
    home = root / "imagenet"
    make_shards(home / "train", home / "new", samples_per_shard=8, workers=1)
    (home / "new" / "classes.txt").unlink()
    shutil.rmtree(home / "train")
    (home / "new").rename(home / "train")
    cfg = config("MODEL.CLASSIFIER.NUM_CLASSES", "3")
    check_datasets(cfg, ["imagenet_train"])
    with pytest.raises(UserError, match=r"imagenet_train: .* no names"):
        check_datasets(cfg, ["imagenet_train", "imagenet_val"])


def test_official_numbers_go_by_the_number_of_the_image(root):
    """A part of the images keeps its labels."""
    classes = flatten(root)
    official(root, classes)
    gone = next(iter(classes))
    (root / "imagenet" / "val" / gone).unlink()
    names = [class_name(label) for label in range(3)]
    findings = Findings()
    records = load(config(), "imagenet_val")
    assert {r["image_id"]: names[r["label"]] for r in records} == {
        name: wnid for name, wnid in classes.items() if name != gone
    }
    read_set(MetadataCatalog.get("imagenet_val").source, findings)
    assert any("1 label in" in line for line in findings.lines(NOTE))


def test_shards(root):
    home = root / "imagenet"
    for split in ("train", "val"):
        make_shards(home / split, home / "new" / split, samples_per_shard=4, workers=1)
        expected = {r["image_id"]: r["label"] for r in load(config(), f"imagenet_{split}")}
        shutil.rmtree(home / split)
        (home / "new" / split).rename(home / split)
        DatasetCatalog.remove(f"imagenet_{split}")
        MetadataCatalog.remove(f"imagenet_{split}")
        records = load(config(), f"imagenet_{split}")
        assert {f"{r['image_id']}.JPEG": r["label"] for r in records} == expected
        assert all(r["file_name"].endswith(".tar") for r in records)
    assert MetadataCatalog.get("imagenet_val").thing_classes == [class_name(i) for i in range(3)]


def test_training_batches_need_no_sizes(root):
    cfg = config("SOLVER.IMS_PER_BATCH", "4", "DATALOADER.NUM_WORKERS", "0")
    dicts = load(cfg, "imagenet_train")
    batch = next(iter(build_train_loader(cfg, dicts, seed=0)))
    assert len(batch) == 4
    assert all(set(item) >= {"file_name", "image_id", "label"} for item in batch)


def test_names_follow_the_environment(root, tmp_path, monkeypatch):
    config()
    assert MetadataCatalog.get("imagenet_val").image_dir == f"{root}/imagenet/val"
    monkeypatch.delenv("DETECTRON2_DATASETS")
    config()
    assert MetadataCatalog.get("imagenet_val").image_dir == "datasets/imagenet/val"


# --- DATASETS.REGISTER ---------------------------------------------------------------------------


def registered(root: Path) -> list[str]:
    """A flat set and one of class folders, by paths."""
    classes = flatten(root)
    lines(root, classes)
    home = root / "imagenet"
    entries = [
        ["mine_train", str(home / "train")],
        ["mine_val", str(home / "val_labels.txt"), str(home / "val")],
    ]
    return [
        *("DATASETS.REGISTER", str(entries)),
        *("DATASETS.TRAIN", "('mine_train',)", "DATASETS.TEST", "('mine_val',)"),
    ]


def test_own_sets_decide_the_number_of_classes(root):
    options = registered(root)
    args = parse_arguments(["--config-file", LEAF, *options])
    cfg = configure(args)
    assert cfg.MODEL.CLASSIFIER.NUM_CLASSES == 3
    assert args.notes == (f"{KEY} 3: the number of classes of mine_train",)
    check_datasets(cfg, ["mine_train", "mine_val"])
    assert len(load_dataset_dicts(cfg, ["mine_train"], train=True)) == 9
    assert len(load_dataset_dicts(cfg, ["mine_val"], train=False)) == 6
    assert count_classes(cfg, "mine_val") == 3
    register_datasets(cfg)
    other = load_config(LEAF, ["DATASETS.REGISTER", "[['mine_train', 'elsewhere']]"])
    with pytest.raises(UserError, match="mine_train is taken"):
        register_datasets(other)
    with pytest.raises(UserError, match=r"labels of images, .*GeneralizedRCNN"):
        detector = configure(parse_arguments(["--config-file", DETECTOR, *options]))
        check_datasets(detector, ["mine_train"])
    with pytest.raises(UserError, match=f"3 classes, but {KEY} is 5"):
        check_datasets(config(*options, KEY, "5"), ["mine_train"])


def test_a_classifier_refuses_objects(coco_root):
    home = coco_root / "coco"
    sets = [["c", f"{home}/annotations/instances_val2017.json", f"{home}/val2017"]]
    cfg = config("DATASETS.REGISTER", str(sets), "DATASETS.TRAIN", "('c',)")
    with pytest.raises(UserError, match=r"objects, .*ImageClassifier"):
        check_datasets(cfg, ["c"])


@pytest.mark.parametrize(
    "value", ["[['m', 'labels.txt']]", "[['m', 'a.json']]", "[['m']]", "[['m', '']]"]
)
def test_form_of_entries_is_told(value):
    with pytest.raises(UserError, match=r"\[name, folder\]"):
        register_datasets(load_config(LEAF, ["DATASETS.REGISTER", value]))


# --- mistakes ------------------------------------------------------------------------------------


def _first(root: Path, split: str = "train") -> Path:
    return root / "imagenet" / split / class_name(0)


def _no_root(root: Path) -> None:
    shutil.rmtree(root / "imagenet")


def _empty_class(root: Path) -> None:
    for file in _first(root).iterdir():
        file.unlink()


def _extra_class(root: Path) -> None:
    shutil.copytree(_first(root, "val"), root / "imagenet" / "val" / "n77")


def _lost_class(root: Path) -> None:
    shutil.rmtree(_first(root, "val"))


def _mixed(root: Path) -> None:
    Image.new("RGB", (8, 8)).save(root / "imagenet" / "train" / "stray.png")


def _hidden(root: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(_first(root), root / "imagenet" / split / ".ipynb_checkpoints")


def _dead_link(root: Path) -> None:
    for split in ("train", "val"):
        (root / "imagenet" / split / "n77").symlink_to(root / "gone")


def _nothing(root: Path) -> None:
    for folder in (root / "imagenet" / "train").iterdir():
        shutil.rmtree(folder)


def _flat(*labels: Callable[[Path, dict], None], **changes: str | None) -> Callable[[Path], None]:
    """A flat val whose classes are changed before they are written; None drops an image's."""

    def damage(root: Path) -> None:
        classes = flatten(root)
        for number, change in changes.items():
            name = f"ILSVRC2012_val_{int(number[1:]):08d}.JPEG"
            if change is None:
                del classes[name]
            else:
                classes[name] = change
        for write in labels:
            write(root, classes)

    return damage


def _home(name: str, content: str | bytes | None) -> Callable[[Path, dict], None]:
    def write(root: Path, classes: dict) -> None:
        file = root / "imagenet" / name
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def _rename(root: Path, classes: dict) -> None:
    file = root / "imagenet" / "val" / "ILSVRC2012_val_00000002.JPEG"
    file.rename(file.with_name("second.JPEG"))


DAMAGE = {
    "no folder": (_no_root, "train does not exist"),
    "empty class": (_empty_class, "class folders without images"),
    "class that train lacks": (_extra_class, "train (1 too many: n77)"),
    "hidden folder": (_hidden, "[.ipynb_checkpoints"),
    "dead link": (_dead_link, "lead nowhere"),
    "class that val lacks": (_lost_class, f"train (1 missing: {class_name(0)})"),
    "folders and images": (_mixed, "(stray.png"),
    "empty": (_nothing, "train is empty"),
    "no label file": (_flat(), f"val_labels.csv, LOC_val_solution.csv, {GROUND_TRUTH}"),
    "no meta.mat": (_flat(official, _home("meta.mat", None)), "whose meta.mat"),
    "damaged meta.mat": (
        _flat(official, _home("meta.mat", b"MATLAB 5.0 MAT-file")),
        "meta.mat is not",
    ),
    "unknown number": (
        _flat(official, _home(GROUND_TRUTH, "1\n2\n7\n1\n2\n3\n")),
        "line 3: meta.mat has no class 7",
    ),
    "too few numbers": (
        _flat(official, _home(GROUND_TRUTH, "1\n2\n3\n1\n2\n")),
        "1 [ILSVRC2012_val_00000006.JPEG]",
    ),
    "other file names": (_flat(official, _rename), f"{GROUND_TRUTH}: 1 [second.JPEG]"),
    "unlabelled": (_flat(lines, _3=None), "val_labels.txt: 1 [ILSVRC2012_val_00000003.JPEG]"),
    "unlabelled at Kaggle": (_flat(kaggle, _3=None), "csv: 1 [ILSVRC2012_val_00000003.JPEG]"),
    "other class": (_flat(lines, _3="n77"), "no class (3 classes: n00000001, ...): 1 [ILSVRC2012"),
    "one column": (_flat(_home("val_labels.txt", "a.JPEG\n")), "has the line ['a.JPEG'], it must"),
    "three columns": (_flat(_home("val_labels.csv", "a,b,c\n")), "has the line ['a', 'b', 'c']"),
    "two classes": (_flat(_home("val_labels.txt", "a b\na c\n")), "gives a two classes, b and c"),
    "empty file": (_flat(_home("val_labels.txt", "\n")), "val_labels.txt is empty"),
    "stray quotation mark": (
        _flat(_home("val_labels.csv", '"a,b\n' + "c,d\n" * 999)),
        "has the line ['a,bc,dc,d",
    ),
    "no text": (_flat(_home("val_labels.txt", b"\xff\xfe")), "val_labels.txt cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_mistakes_are_told(root, damage):
    change, said = DAMAGE[damage]
    change(root)
    cfg = config()
    with pytest.raises(UserError) as caught:
        check_datasets(cfg, NAMES)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_what_is_left_out_is_told_once(root, caplog):
    (_first(root) / "0.JPEG").rename(_first(root) / "0.jfif")
    cfg = config()
    for _ in range(2):
        assert len(load_dataset_dicts(cfg, ["imagenet_train"], train=True)) == 8
    (line,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert line.getMessage().startswith("imagenet_train: ")
    assert "0.jfif" in line.getMessage()


def test_loading_stops_too(root):
    _lost_class(root)
    cfg = config()
    with pytest.raises(UserError, match="imagenet_val: its class folders"):
        load_dataset_dicts(cfg, ["imagenet_val"], train=False)


def test_numbers_for_classes_are_not_guessed(root):
    classes = flatten(root)
    numbers = {class_name(label): str(label) for label in range(3)}
    lines(root, {name: numbers[wnid] for name, wnid in classes.items()})
    shutil.rmtree(root / "imagenet" / "train")
    with pytest.raises(UserError, match="numbers in place of class names"):
        check_datasets(config(), ["imagenet_val"])
    (root / "imagenet" / "val" / "classes.txt").write_text("2\n1\n0\n")
    records = load(config(), "imagenet_val")
    names = [class_name(label) for label in (2, 1, 0)]
    assert {r["image_id"]: names[r["label"]] for r in records} == classes


def test_label_files_are_for_flat_folders(root):
    options = registered(root)
    entries = [["mine_val", str(root / "imagenet/val_labels.txt"), str(root / "imagenet/train")]]
    cfg = config(*options[2:], "DATASETS.REGISTER", str(entries), "DATASETS.TRAIN", "()", KEY, "3")
    with pytest.raises(UserError, match="holds folders"):
        check_datasets(cfg, ["mine_val"])
    entries = [["mine", str(root / "imagenet" / "val")]]
    cfg = config("DATASETS.REGISTER", str(entries), "DATASETS.TRAIN", "('mine',)", KEY, "3")
    with pytest.raises(UserError, match=r"DATASETS.REGISTER as \[name, label file"):
        check_datasets(cfg, ["mine"])
    with pytest.raises(UserError, match=r"data set mine: .* need a label file"):
        config("DATASETS.REGISTER", str(entries), "DATASETS.TRAIN", "('mine',)")


@pytest.mark.parametrize(
    ("key", "value"),
    [("ASPECT_RATIO_GROUPING", "True"), ("SAMPLER_TRAIN", "RepeatFactorTrainingSampler")],
)
def test_settings_that_need_objects_are_told(root, key, value):
    with pytest.raises(UserError, match=f"DATALOADER.{key} is {value}"):
        check_datasets(config(f"DATALOADER.{key}", value), NAMES)


def test_differences_are_named():
    assert describe_difference(["a", "b"], ["a", "b"]) == ""
    assert (
        describe_difference(["b", "a"], ["a", "b"]) == "another order: number 0 is b instead of a"
    )
    assert describe_difference(["a", "c"], ["a", "b"]) == "1 too many: c; 1 missing: b"
    many = [str(number) for number in range(9)]
    assert describe_difference(many, []) == "9 too many: 0, 1, 2, ..."


# --- pixels --------------------------------------------------------------------------------------

ORIENTATIONS = range(1, 9)
# What undoes each orientation, by numpy.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.fixture
def picture() -> Image.Image:
    """Smooth, so that JPEG keeps it; no two corners alike."""
    y, x = np.mgrid[:48, :64]
    channels = [x * 3 + 20, y * 4 + 30, 220 - x - 2 * y]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


def decode(path: Path) -> np.ndarray:
    image = read_image({"file_name": str(path)})
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def far(one: np.ndarray, other: object) -> int:
    other = np.asarray(other).astype(int)
    assert one.shape == other.shape
    return int(np.abs(one - other).max())


def grey(picture: Image.Image) -> np.ndarray:
    return np.repeat(np.asarray(picture.convert("L"))[..., None], 3, axis=2)


@pytest.mark.parametrize("number", ORIENTATIONS)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_exif_turns(picture, tmp_path, number, ending):
    exif = Image.Exif()
    exif[0x0112] = number
    options = {"quality": 95} if ending != "webp" else {"lossless": True}
    picture.save(tmp_path / f"p.{ending}", exif=exif.tobytes(), **options)
    stored = np.asarray(picture)
    assert far(decode(tmp_path / f"p.{ending}"), UPRIGHT[number](stored)) <= 8


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12"])
def test_damaged_exif_does_not_matter(picture, tmp_path, exif):
    picture.save(tmp_path / "p.jpg", quality=95, exif=exif)
    assert far(decode(tmp_path / "p.jpg"), picture) <= 8


def test_cmyk(picture, tmp_path):
    picture.convert("CMYK").save(tmp_path / "p.jpg", quality=98)
    with Image.open(tmp_path / "p.jpg") as image:
        assert image.mode == "CMYK"
    assert far(decode(tmp_path / "p.jpg"), picture) <= 8


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey(picture, tmp_path, mode):
    stored = picture.convert("1" if mode == "1" else "L")
    stored.convert(mode).save(tmp_path / "p.png")
    assert far(decode(tmp_path / "p.png"), grey(stored)) == 0
    if mode == "L":
        stored.save(tmp_path / "p.jpg", quality=95)
        assert far(decode(tmp_path / "p.jpg"), grey(stored)) <= 8


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_grey_in_16_bits(picture, tmp_path, ending):
    values = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    if ending == "pgm":
        head = f"P5 {values.shape[1]} {values.shape[0]} 65535\n".encode()
        (tmp_path / "p.pgm").write_bytes(head + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / f"p.{ending}")
    assert far(decode(tmp_path / f"p.{ending}"), grey(picture)) == 0


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.filterwarnings("error::UserWarning")
def test_palette(picture, tmp_path, transparent):
    stored = picture.quantize(64)
    colours = stored.convert("RGB")
    options = {"transparency": bytes([0, 128, 255])} if transparent else {}
    stored.save(tmp_path / "p.png", **options)
    with Image.open(tmp_path / "p.png") as image:
        assert image.mode == "P"
    assert far(decode(tmp_path / "p.png"), colours) == 0


def test_transparency_is_dropped(picture, tmp_path):
    stored = picture.copy()
    stored.putalpha(Image.linear_gradient("L").resize(picture.size))
    stored.save(tmp_path / "p.png")
    assert far(decode(tmp_path / "p.png"), picture) == 0


BROKEN = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no image": lambda data: b"<html>404</html>" * 20,
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_images_are_named(picture, tmp_path, damage):
    file = tmp_path / "p.JPEG"
    picture.save(file, quality=95)
    file.write_bytes(BROKEN[damage](file.read_bytes()))
    with pytest.raises(UserError) as caught:
        read_image({"file_name": str(file)})
    message = str(caught.value)
    assert message.startswith(f"the image {file} cannot be read (") and "\n" not in message
    assert ("no kind" in message) == (damage != "cut")
    assert "python tools/doctor.py" in message


def test_missing_and_strange_images_are_named(picture, tmp_path):
    with pytest.raises(UserError, match=r"gone.jpg cannot be read"):
        read_image({"file_name": str(tmp_path / "gone.jpg")})
    for values in (np.full((4, 4), 70000, np.int32), np.zeros((4, 4), np.float32)):
        Image.fromarray(values).save(tmp_path / "p.tif")
        with pytest.raises(UserError, match=r"p.tif .*its pixels"):
            read_image({"file_name": str(tmp_path / "p.tif")})


# --- the doctor ----------------------------------------------------------------------------------


def run_doctor(capsys, *options: str) -> tuple[int, list[str]]:
    status = doctor(["--config-file", LEAF, "--workers", "2", KEY, "3", *options])
    printed = capsys.readouterr()
    return status, [line.strip() for line in (printed.out + printed.err).splitlines()]


def test_doctor_counts(root, capsys):
    first = _first(root)
    picture = draw_picture(0, 3, 48, np.random.default_rng(5))
    picture.convert("L").save(first / "0.JPEG")
    picture.convert("CMYK").save(first / "1.JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(first / "2.JPEG", exif=exif.tobytes())
    status, said = run_doctor(capsys)
    assert status == 0, said
    assert any(re.search(r"\b1 .*CMYK.*\b1 .*grey.*\b1 .*EXIF", line) for line in said)
    assert any(re.match(r"NOTE .*\b9 .*\b3 .*\b1281167 .*\b1000\b", line) for line in said)
    assert said[-1].startswith("0 errors, 2 notes")


def test_doctor_lists_what_cannot_be_read(root, capsys):
    _first(root, "val").joinpath("0.JPEG").write_bytes(b"")
    cut = _first(root) / "1.JPEG"
    cut.write_bytes(cut.read_bytes()[:400])
    (_first(root) / "Thumbs.db").write_text("no image")
    status, said = run_doctor(capsys)
    assert status == 1
    errors = [line for line in said if line.startswith("ERROR")]
    assert len(errors) == 2
    assert errors[0].startswith(f"ERROR  images that cannot be read: 1 [{cut} (")
    assert any(line.startswith("NOTE") and "Thumbs.db" in line for line in said)


def test_doctor_tells_names_that_are_no_text(root, capsys):
    with open(os.fsencode(_first(root)) + b"/\xe9.jpg", "wb") as file:
        file.write(b"broken")
    status, said = run_doctor(capsys)
    assert status == 1
    (error,) = [line for line in said if line.startswith("ERROR")]
    assert "/\\udce9.jpg (" in error


@pytest.mark.parametrize("damage", ["no folder", "empty class", "no meta.mat", "unlabelled"])
def test_doctor_tells_mistakes(root, capsys, damage):
    change, said = DAMAGE[damage]
    change(root)
    status, printed = run_doctor(capsys)
    assert status == 1
    assert any(line.startswith("ERROR") and said in line for line in printed), printed


def test_official_counts(root, capsys, monkeypatch):
    from contnet.data.validation import dataset as checks

    counts = {"imagenet_train": (9, 3), "imagenet_val": (6, 3)}
    official = {name: ("ImageNet", count) for name, count in counts.items()}
    monkeypatch.setattr(checks, "OFFICIAL_COUNTS", official)
    status, said = run_doctor(capsys)
    assert status == 0 and said[-1].startswith("0 errors, 0 notes")


# --- a run ---------------------------------------------------------------------------------------


@pytest.fixture
def broken_run(root, tmp_path) -> list[str]:
    """The command line of a run, of whose images some are broken."""
    for folder in (root / "imagenet" / "train").iterdir():
        folder.joinpath("0.JPEG").write_bytes(b"broken")
    small = "MODEL.DEVICE cpu SOLVER.IMS_PER_BATCH 8 SOLVER.MAX_ITER 2 SOLVER.WARMUP_ITERS 1"
    more = f"INPUT.CLASSIFIER.SIZE 32 OUTPUT_DIR {tmp_path}/run"
    return ["--config-file", LEAF, KEY, "3", *small.split(), *more.split()]


def assert_broken_image_is_told(root: Path, errors: str) -> None:
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in errors, errors
    assert said[0].startswith(f"error: the image {root}/imagenet/train/n0000000")


def test_a_broken_image_is_told(root, broken_run, capsys):
    assert main([*broken_run, "DATALOADER.NUM_WORKERS", "0"]) == 1
    assert_broken_image_is_told(root, capsys.readouterr().err)


@pytest.mark.slow
def test_a_broken_image_in_a_worker_ends_the_process_in_one_line(root, broken_run):
    command = [sys.executable, str(REPOSITORY / "train_net.py"), *broken_run]
    command += ["DATALOADER.NUM_WORKERS", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert_broken_image_is_told(root, done.stderr)
