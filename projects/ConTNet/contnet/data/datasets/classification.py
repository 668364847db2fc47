"""Data sets for image classification: their location and content.

A data set is a folder in one of three layouts, which are recognised by the folder's content:

- class folders with images, by the rules of torchvision's ImageFolder;
- images whose classes are in a label file (:mod:`contnet.data.datasets.imagenet_labels`);
- shards (:mod:`contnet.data.datasets.shards`).

Records are Detectron2's data set dicts with ``file_name``, ``image_id`` (the path within the
folder, or the key in a shard) and ``label``; those of shards also have ``offset`` and ``size``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from contnet.data.datasets.imagenet_labels import LABEL_FILES, find_label_file, read_labels
from contnet.data.datasets.shards import (
    CLASSES_FILE,
    SHARD_ENDING,
    read_classes,
    read_index,
    read_manifest,
    sample_name,
    shard_records,
)
from contnet.data.findings import ERROR, Findings
from contnet.utils.errors import UserError
from contnet.utils.text import describe_difference, plural

__all__ = [
    "EVALUATOR_TYPE",
    "ClassificationSet",
    "ClassificationSource",
    "count_labels",
    "read_set",
]

EVALUATOR_TYPE = "classification"
_SHOWN = 3  # names of classes in messages
_THREADS = 16  # list folders; on network file systems they mostly wait


@dataclass(frozen=True)
class ClassificationSource:
    """The location of a data set.

    Attributes:
        image_dir: folder of the data set.
        label_file: label file of a flat folder; "" to look for one in ``home``.
        home: the folder ``imagenet``, for its validation set.
        train_dir: training set whose classes are required, if it exists.
    """

    image_dir: str
    label_file: str = ""
    home: str = ""
    train_dir: str = ""


@dataclass
class ClassificationSet:
    """The content of a data set.

    Attributes:
        records: records of all images, in order.
        classes: class names in the order of the labels; None if they are unknown.
        label_file: label file that was read; "" for none.
    """

    records: list[dict] = field(default_factory=list)
    classes: list[str] | None = None
    label_file: str = ""

    @property
    def number_of_classes(self) -> int:
        if self.classes is not None:
            return len(self.classes)
        return max((record["label"] for record in self.records), default=-1) + 1


# ------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------


def _is_image(name: str) -> bool:
    """Whether a name is an image's; ._1.jpg is not, because macOS keeps metadata of 1.jpg in it."""
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _is_hidden(folder: str) -> bool:
    """Whether a folder belongs to a tool, such as .ipynb_checkpoints with copies of images."""
    return folder.startswith(".") or folder == "__MACOSX"


@dataclass
class _Listing:
    """The names in a folder."""

    folders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # circular links
        return False


def _list(folder: str) -> _Listing:
    found = _Listing()
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_folder(entry):
                found.folders.append(entry.name)
            elif _is_image(entry.name):
                found.images.append(entry.name)
            elif entry.name.endswith(SHARD_ENDING):
                found.shards.append(entry.name)
            else:
                found.others.append(entry.name)
    for names in (found.folders, found.images, found.shards, found.others):
        names.sort()
    return found


def _list_class(folder: str, above: frozenset[str] = frozenset()) -> tuple[list[str], list[str]]:
    """Returns paths of the images of a class, in ImageFolder's order, and of its other files.

    Args:
        folder: folder of the class, or a subfolder of it.
        above: resolved paths of the folders that contain it.

    Raises:
        OSError: if a folder cannot be listed, or a link leads back to a folder that contains it.
    """
    place = os.path.realpath(folder)
    if place in above:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), folder)
    found = _list(folder)
    images = [f"{folder}/{name}" for name in found.images]
    others = [f"{folder}/{name}" for name in (*found.shards, *found.others)]
    for name in found.folders:
        if _is_hidden(name):
            others.append(f"{folder}/{name}")
            continue
        below = _list_class(f"{folder}/{name}", above | {place})
        images += below[0]
        others += below[1]
    if found.folders:
        images.sort(key=os.path.split)
    return images, others


def _read_folders(
    source: ClassificationSource, found: _Listing, findings: Findings
) -> ClassificationSet:
    classes = _train_classes(source) or found.folders
    if differing := describe_difference(found.folders, classes):
        findings.error(f"its class folders are not those of {source.train_dir} ({differing})")
    for name in found.folders:
        if _is_hidden(name):
            findings.error("hidden folders among the class folders: remove them", name)
    for name in found.others:
        path = f"{source.image_dir}/{name}"
        if not os.path.exists(path):
            findings.error("broken links among the class folders", path)
    labels = {name: label for label, name in enumerate(classes)}
    names = [name for name in found.folders if name in labels]
    records = []
    with ThreadPoolExecutor(_THREADS) as pool:
        listed = pool.map(_list_class, [f"{source.image_dir}/{name}" for name in names])
        for name, (images, others) in zip(names, listed, strict=True):
            if not images:
                findings.error(f"class folders without images ({', '.join(IMG_EXTENSIONS)})", name)
            for path in others:
                findings.note("files without an image suffix, which are ignored", path)
            label, start = labels[name], len(source.image_dir) + 1
            records += [
                {"file_name": path, "image_id": path[start:], "label": label} for path in images
            ]
    return ClassificationSet(records, list(classes))


# ------------------------------------------------------------------------------
# The two other layouts, and the choice
# ------------------------------------------------------------------------------


def _label_order(
    source: ClassificationSource, labels: dict[str, str], told: list[str] | None, file: str
) -> list[str]:
    """Returns the classes of a flat folder in their order."""
    names = sorted(set(labels.values()))
    order = _train_classes(source) or read_classes(source.image_dir) or told or names
    if order is names and all(name.isdecimal() for name in names):
        raise UserError(
            f"{file} has numbers instead of class names, without their meaning: write "
            f"names, or put {CLASSES_FILE} with the names in order into {source.image_dir}"
        )
    return order


def _read_flat(
    source: ClassificationSource, found: _Listing, findings: Findings
) -> ClassificationSet:
    file = source.label_file or (find_label_file(source.home) if source.home else None)
    if file is None:
        cure = (
            f"put one of {', '.join(LABEL_FILES)} into {Path(source.home).absolute()}"
            if source.home
            else "register it in DATASETS.REGISTER as [name, label file, folder]"
        )
        raise UserError(
            f"{Path(source.image_dir).absolute()} has images without class folders, which require "
            f"a label file: {cure}"
        )
    labels, told, unused = read_labels(file, found.images)
    classes = _label_order(source, labels, told, file)
    numbers = {name: label for label, name in enumerate(classes)}
    records = []
    for image in found.images:
        name = labels.get(image)
        if name is None:
            findings.error(f"images without a label in {file}", image)
        elif name not in numbers:
            what = f"labels that are not classes ({len(classes)} classes: {classes[0]}, ...)"
            findings.error(what, f"{image} {name}")
        else:
            path = f"{source.image_dir}/{image}"
            records.append({"file_name": path, "image_id": image, "label": numbers[name]})
    if unused:
        findings.note(f"{plural(unused, 'label')} in {file} without an image in the folder")
    return ClassificationSet(records, list(classes), file)


def _read_shards(
    source: ClassificationSource, found: _Listing, findings: Findings
) -> ClassificationSet:
    records = shard_records(source.image_dir, read_index(source.image_dir, found.shards))
    stamp = read_manifest(source.image_dir)
    if stamp and stamp["images"] != len(records):
        raise UserError(
            f"the shards in {source.image_dir} contain only {len(records)} of {stamp['images']} "
            "images: run tools/make_shards.py again to finish them, or copy all of them"
        )
    classes = read_classes(source.image_dir)
    expected = _train_classes(source)
    if classes is None:
        findings.note(
            "its classes have no names, so their order cannot be compared: write them to "
            f"{CLASSES_FILE} in its folder, one per line"
        )
    elif expected and (differing := describe_difference(classes, expected)):
        raise UserError(
            f"the classes in {source.image_dir}/{CLASSES_FILE} are not those of "
            f"{source.train_dir} ({differing})"
        )
    if classes is not None:
        for record in records:
            if record["label"] >= len(classes):
                what = f"labels beyond the {plural(len(classes), 'class')}"
                findings.error(what, f"{sample_name(record)} {record['label']}")
    return ClassificationSet(records, classes)


_LAYOUTS: dict[str, Callable[[ClassificationSource, _Listing, Findings], ClassificationSet]] = {
    "folders": _read_folders,
    "images": _read_flat,
    "shards": _read_shards,
}


def _choose(folder: str, found: _Listing) -> str:
    present = {kind: names for kind in _LAYOUTS if (names := getattr(found, kind))}
    where = Path(folder).absolute()
    if not present:
        raise UserError(
            f"{where} is empty: it must contain class folders, or images with a label file, or "
            f"shards *{SHARD_ENDING}"
        )
    if len(present) > 1:
        kinds = " and ".join(f"{kind} ({names[0]}, ...)" for kind, names in present.items())
        raise UserError(f"{where} contains {kinds}: keep only one kind")
    return next(iter(present))


def _train_classes(source: ClassificationSource) -> list[str] | None:
    """Returns the classes of the training set in order; None if they are unknown."""
    if not source.train_dir or not os.path.isdir(source.train_dir):
        return None
    found = _list(source.train_dir)
    layout = _choose(source.train_dir, found)
    return found.folders if layout == "folders" else read_classes(source.train_dir)


def _check_use(
    source: ClassificationSource, content: ClassificationSet, findings: Findings
) -> None:
    """Adds facts and notes about the whole data set."""
    names = content.classes
    number = content.number_of_classes
    shown = ""
    if names:
        shown = f" ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
    findings.fact(f"{plural(len(content.records), 'image')}, {plural(number, 'class')}{shown}")
    if content.label_file and not source.label_file:
        findings.fact(f"label file {os.path.abspath(content.label_file)}")
    if findings.lines(ERROR):
        return
    used = {record["label"] for record in content.records}
    for label in range(number):
        if label not in used:
            findings.note("classes without images", names[label] if names else str(label))


def read_set(source: ClassificationSource, findings: Findings) -> ClassificationSet:
    """Lists the content of a data set, without opening images.

    Args:
        source: location of the data set; the folder exists.
        findings: receives what is wrong; if there are errors, the content must not be used.
    """
    try:
        found = _list(source.image_dir)
        layout = _choose(source.image_dir, found)
        if source.label_file and layout != "images":
            raise UserError(
                f"{source.label_file} is for a folder of images, but {source.image_dir} contains "
                f"{layout}: give [name, folder] in DATASETS.REGISTER"
            )
        content = _LAYOUTS[layout](source, found, findings)
    except UserError as error:
        findings.error(str(error))
        return ClassificationSet()
    except OSError as error:
        findings.error(f"{error.filename} cannot be read ({error.strerror})")
        return ClassificationSet()
    if not findings.lines(ERROR) and not content.records:
        findings.error(f"there are no images in {source.image_dir}")
    _check_use(source, content, findings)
    return content


def count_labels(name: str, source: ClassificationSource) -> int:
    """Returns the number of classes of a data set, without listing its images if possible.

    Args:
        name: name of the data set, for messages.
        source: location of the data set.

    Raises:
        UserError: if the data set cannot be read.
    """
    findings = Findings()
    try:
        found = _list(source.image_dir)
        layout = _choose(source.image_dir, found)
        if layout == "folders" and not source.label_file:
            return len(found.folders)
        number = read_set(source, findings).number_of_classes
    except UserError as error:
        raise UserError(f"data set {name}: {error}") from error
    except OSError as error:
        raise UserError(
            f"data set {name}: {error.filename} cannot be read ({error.strerror})"
        ) from error
    if not number:
        raise UserError(f"data set {name}: {findings.lines(ERROR)[0]}")
    return number
