"""A drawn ImageNet that tests can damage, its configs, and its layouts with label files."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import REPOSITORY
from detectron2.config import CfgNode
from imagenet import class_name, make_imagenet

from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.validation.dataset import check_datasets
from contnet.launch.arguments import configure

LEAF = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
KEY = "MODEL.CLASSIFIER.NUM_CLASSES"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


@pytest.fixture(scope="session")
def drawn_images(tmp_path_factory) -> Path:
    return make_imagenet(tmp_path_factory.mktemp("drawn"), train=3, val=2)


@pytest.fixture
def root(drawn_images, tmp_path, monkeypatch) -> Path:
    """Makes a copy of the drawn set for DETECTRON2_DATASETS, which tests can damage."""
    shutil.copytree(drawn_images / "imagenet", tmp_path / "imagenet")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


def config(*options: str) -> CfgNode:
    number = [] if KEY in options or "DATASETS.REGISTER" in options else [KEY, "3"]
    return configure(LEAF, [*options, *number])[0]


def load(cfg: CfgNode, name: str) -> list[dict]:
    check_datasets(cfg, [name])
    return load_dataset_dicts(cfg, [name], train=True)


def flatten(root: Path) -> dict[str, str]:
    """Makes val a flat folder with ImageNet's names; returns the class of each image."""
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
    """Writes a meta.mat like the development kit's, with leaves and a class above them."""
    rows = [(number, name, "words", "gloss", 0) for number, name in numbers.items()]
    rows.append((len(rows) + 1, "n99999999", "entity", "all", len(rows)))
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O")]
    synsets = np.array(rows, dtype=[*kinds, ("num_children", "O")]).reshape(-1, 1)
    scipy.io.savemat(file, {"synsets": synsets})


# Not in the order of the names.
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
