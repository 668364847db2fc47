"""Label files of flat image folders, which give the class of each image.

Three formats are recognised by their content:

- ImageNet's own, ``ILSVRC2012_validation_ground_truth.txt``: one number per line, for the image
  whose name ends with the number of the line. The numbers are those of ``meta.mat`` in the
  development kit, which do not follow the order of the class names and mean nothing without it.
- Kaggle's, ``LOC_val_solution.csv``: lines ``ImageId,PredictionString``, where the class is the
  first word of the latter.
- Lines ``image class``, or ``image,class`` in a ``.csv`` file.

Images may be written with or without their extension.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.io

from contnet.utils.errors import UserError
from contnet.utils.files import open_regular

__all__ = ["LABEL_ENDINGS", "LABEL_FILES", "find_label_file", "is_label_file", "read_labels"]

# Searched in this order in imagenet/ and in the folders of the development kit there.
LABEL_FILES = (
    "val_labels.txt",
    "val_labels.csv",
    "LOC_val_solution.csv",
    "ILSVRC2012_validation_ground_truth.txt",
)
LABEL_ENDINGS = (".txt", ".csv")
_KIT = ("", "ILSVRC2012_devkit_t12/data", "devkit/data", "devkit")
_META = "meta.mat"
_HEADERS = {"imageid", "image", "image_id", "file", "file_name", "filename", "path", "name"}


def is_label_file(path: str) -> bool:
    """Whether DATASETS.REGISTER treats a path as a label file, not as COCO annotations."""
    return path.lower().endswith(LABEL_ENDINGS)


def find_label_file(home: str) -> str | None:
    """Returns the first label file found in ``imagenet/``, or None."""
    places = [Path(home, folder, name) for name in LABEL_FILES for folder in _KIT]
    return next((str(place) for place in places if place.is_file()), None)


def _read_lines(file: str) -> list[str]:
    try:
        with open_regular(file, "r", encoding="utf-8-sig") as text:
            lines = text.read().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"the label file {file} cannot be read ({error})") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError(f"the label file {file} is empty")
    return lines


def _read_meta(label_file: str) -> dict[int, str]:
    """Returns class names by their numbers in the development kit.

    Raises:
        UserError: if there is no meta.mat for the label file, or it is not ImageNet's.
    """
    folder = Path(label_file).parent
    places = [folder / part / _META for part in _KIT]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UserError(
            f"{label_file} has class numbers of the development kit, which its {_META} explains: "
            f"put it into {folder.absolute()} (it is in ILSVRC2012_devkit_t12.tar.gz, folder data)"
        )
    try:
        synsets = scipy.io.loadmat(str(path), squeeze_me=True)["synsets"]
        columns = [np.atleast_1d(synsets[key]) for key in ("ILSVRC2012_ID", "WNID", "num_children")]
        rows = zip(*(column.tolist() for column in columns), strict=True)
        names = {int(number): str(name) for number, name, children in rows if int(children) == 0}
    except Exception as error:  # scipy raises any exception on a damaged file
        raise UserError(
            f"{path} is not the {_META} of ImageNet's development kit "
            f"({type(error).__name__}: {error}): unpack it again"
        ) from error
    if len(set(names.values())) < len(names):
        raise UserError(f"{path} gives two numbers the same class: unpack it again")
    return names


def _read_official(file: str, lines: Sequence[str], images: Sequence[str]) -> dict[str, str]:
    names = _read_meta(file)
    labels = {}
    for image in images:
        match = re.fullmatch(r".*_val_(\d{8})", os.path.splitext(image)[0])
        if not match or not 1 <= int(match[1]) <= len(lines):
            continue  # the image has no label, which is reported
        number = int(lines[int(match[1]) - 1])
        if number not in names:
            raise UserError(f"{file}, line {int(match[1])}: {_META} has no class {number}")
        labels[image] = names[number]
    return labels


def _read_rows(file: str, lines: Sequence[str]) -> dict[str, str]:
    """Returns class names by the image names in the file."""
    if file.lower().endswith(".csv"):
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    else:
        rows = [line.rsplit(maxsplit=1) for line in lines]
    header = [cell.lower() for cell in rows[0]]
    kaggle = header == ["imageid", "predictionstring"]
    if header[0] in _HEADERS:
        rows = rows[1:]
    labels: dict[str, str] = {}
    for row in rows:
        if len(row) != 2 or not all(row):
            # A stray quotation mark merges all following lines into one row.
            raise UserError(
                f"{file} has the line {str(row)[:200]}, it must be an image and its class"
            )
        image, name = row[0], row[1].split()[0] if kaggle else row[1]
        if labels.setdefault(image, name) != name:
            raise UserError(f"{file} gives {image} two classes, {labels[image]} and {name}")
    return labels


def read_labels(file: str, images: Sequence[str]) -> tuple[dict[str, str], list[str] | None, int]:
    """Reads a label file.

    Args:
        file: path of a file in one of the three formats.
        images: names of the image files in the folder.

    Returns:
        The class name of each image that has a label; all class names in order, None if the file
        does not define them; the number of labels without an image.

    Raises:
        UserError: if the file has another format.
    """
    lines = _read_lines(file)
    if all(line.strip().isdecimal() for line in lines):
        labels = _read_official(file, lines, images)
        return labels, sorted(_read_meta(file).values()), len(lines) - len(labels)
    rows = _read_rows(file, lines)
    labels = {}
    used = set()
    for image in images:
        called = image if image in rows else os.path.splitext(image)[0]
        if called in rows:
            labels[image] = rows[called]
            used.add(called)
    return labels, None, len(rows) - len(used)
