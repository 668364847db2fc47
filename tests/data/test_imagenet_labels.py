"""Tests all kinds of label files for flat folders of images."""

import os
import shutil
from pathlib import Path

import pytest
from detectron2.data import MetadataCatalog
from image_folders import config, flatten, kaggle, lines, load, official
from imagenet import class_name

from contnet.data.datasets.classification import read_set
from contnet.data.findings import NOTE, Findings
from contnet.data.validation.dataset import check_datasets
from contnet.utils.errors import UserError

pytest_plugins = ["image_folders"]


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


def test_official_numbers_go_by_the_number_of_the_image(root):
    """A subset of the images keeps its labels."""
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


def test_numbers_for_classes_are_not_guessed(root):
    classes = flatten(root)
    numbers = {class_name(label): str(label) for label in range(3)}
    lines(root, {name: numbers[wnid] for name, wnid in classes.items()})
    shutil.rmtree(root / "imagenet" / "train")
    with pytest.raises(UserError, match="numbers instead of class names"):
        check_datasets(config(), ["imagenet_val"])
    (root / "imagenet" / "val" / "classes.txt").write_text("2\n1\n0\n")
    records = load(config(), "imagenet_val")
    names = [class_name(label) for label in (2, 1, 0)]
    assert {r["image_id"]: names[r["label"]] for r in records} == classes
