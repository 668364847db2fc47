"""Tests errors in image data sets, as reported before a run and by the doctor."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_folders import GROUND_TRUTH, KEY, LEAF, config, flatten, kaggle, lines, official
from imagenet import class_name, draw_picture
from PIL import Image

from contnet.commands.doctor import main as doctor
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.validation.dataset import check_datasets
from contnet.utils.errors import UserError
from contnet.utils.text import describe_difference

pytest_plugins = ["image_folders"]
NAMES = ("imagenet_train", "imagenet_val")


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
    """Makes val flat with changed classes; None removes an image's class."""

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
    "dead link": (_dead_link, "broken links"),
    "class that val lacks": (_lost_class, f"train (1 missing: {class_name(0)})"),
    "folders and images": (_mixed, "(stray.png"),
    "empty": (_nothing, "train is empty"),
    "no label file": (_flat(), f"val_labels.csv, LOC_val_solution.csv, {GROUND_TRUTH}"),
    "no meta.mat": (_flat(official, _home("meta.mat", None)), "its meta.mat"),
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
    "other class": (
        _flat(lines, _3="n77"),
        "not classes (3 classes: n00000001, ...): 1 [ILSVRC2012",
    ),
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
    assert said[-1].startswith("0 errors")


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


# --- files of other systems ----------------------------------------------------------------------


def test_notes_of_macos_and_copies_of_notebooks_are_no_images(root, capsys):
    first = _first(root)
    before = len(load_dataset_dicts(config(), ["imagenet_train"], train=True))
    (first / "._0.JPEG").write_bytes(b"\0\5\26\7")
    (first / ".ipynb_checkpoints").mkdir()
    shutil.copy(first / "0.JPEG", first / ".ipynb_checkpoints" / "0-checkpoint.JPEG")
    shutil.copy(first / "1.JPEG", first / "UPPER.JPG")
    assert len(load_dataset_dicts(config(), ["imagenet_train"], train=True)) == before + 1
    status, said = run_doctor(capsys)
    assert status == 0, said
    (note,) = [line for line in said if "ignored" in line]
    assert "._0.JPEG" in note and ".ipynb_checkpoints" in note


def test_a_folder_of_macos_is_no_class(root):
    for split in ("train", "val"):
        folder = root / "imagenet" / split / "__MACOSX"
        folder.mkdir()
        (folder / "._0.JPEG").write_bytes(b"\0")
    with pytest.raises(UserError, match="hidden folders among the class folders"):
        check_datasets(config(), NAMES)
