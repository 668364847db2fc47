"""Reads annotation files in COCO format, and converts their content to Detectron2's records.

The records equal those of Detectron2's ``load_coco_json``, which would read the file again. Here,
the content that was checked is converted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

from contnet.data.datasets.annotation_files import check_form, read_json
from contnet.utils.errors import UserError
from contnet.utils.files import open_regular

__all__ = [
    "CocoSource",
    "as_whole",
    "class_names",
    "describe_value",
    "image_names",
    "is_whole",
    "make_records",
    "read_instances",
]

# Longer ids may not fit 64 bits and remain strings.
_WHOLE = re.compile(r"\s*-?[0-9]{1,18}\s*")
_LARGEST = 2**63
_SHOWN = 80  # characters of a value in a message
_KEPT = ("iscrowd", "bbox", "keypoints", "category_id")

logger = logging.getLogger(__name__)


def read_instances(file: str) -> dict:
    """Reads an annotation file; without ground truth (COCO's test-dev), it has no "annotations".

    Raises:
        UserError: if the file is missing or not in COCO format.
    """
    content, _ = read_json(file)
    check_form(content, file)
    return content


def class_names(content: dict) -> list[str]:
    """Returns the names of the classes in the model's order, which is that of their ids.

    Raises:
        UserError: if there are no categories, or one lacks a name or a unique integer id.
    """
    categories = content["categories"]
    for category in categories:
        key = category.get("id")
        if not is_whole(key) and as_whole(key) is not None:
            raise UserError(
                f"its category ids must be integers, not {describe_value(key)}: "
                "tools/doctor.py --fix converts them"
            )
        if not is_whole(category.get("id")) or not isinstance(category.get("name"), str):
            raise UserError(
                f"each category must have an integer id and a name: {describe_value(category)}"
            )
    if not categories:
        raise UserError("its annotation file has no categories")
    counts = Counter(category["id"] for category in categories)
    if double := [one for one, count in counts.items() if count > 1]:
        raise UserError(f"the category id {double[0]} occurs twice")
    return [category["name"] for category in sorted(categories, key=lambda c: c["id"])]


def is_whole(value: object) -> bool:
    """Whether a JSON value is an integer of at most 64 bits, as arrays hold."""
    return isinstance(value, int) and not isinstance(value, bool) and -_LARGEST <= value < _LARGEST


def as_whole(value: object) -> int | None:
    """Returns the integer that a value is, or that a string spells; otherwise None."""
    if is_whole(value):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST:
        return int(value)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    return None


def describe_value(value: object) -> str:
    """Returns the beginning of a value, with its type if needed, for a message."""
    if isinstance(value, str):
        return f"the string {json.dumps(value[:_SHOWN])}"
    if isinstance(value, float):
        return f"{value!r} with a decimal point"
    try:
        return json.dumps(value)[:_SHOWN]
    except RecursionError:
        return "lists in lists"


def _mask(mask: list | dict) -> list | dict:
    """Returns a segmentation without invalid polygons, compressed if it is run-length."""
    if isinstance(mask, list):
        return [polygon for polygon in mask if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if isinstance(mask["counts"], list):
        return mask_util.frPyObjects(mask, *mask["size"])
    return mask


def _keypoints(values: list) -> list:
    """Converts pixel indices in x, y, visibility, ... to coordinates of the pixels' centres."""
    return [value if i % 3 == 2 else value + 0.5 for i, value in enumerate(values)]


def _object(item: dict, numbers: dict) -> dict | None:
    """Converts an annotation; returns None if its mask has no valid polygon."""
    if item.get("ignore"):
        raise ValueError(f'annotation {item["id"]} has "ignore"')
    thing = {key: item[key] for key in _KEPT if key in item}
    if thing.get("bbox") == []:
        raise ValueError(f"annotation {item['id']} has an empty box")
    if item.get("segmentation"):
        thing["segmentation"] = _mask(item["segmentation"])
        if not thing["segmentation"]:
            return None
    if item.get("keypoints"):
        thing["keypoints"] = _keypoints(item["keypoints"])
    thing["bbox_mode"] = BoxMode.XYWH_ABS
    thing["category_id"] = numbers[item["category_id"]]
    return thing


def make_records(content: dict, image_root: str) -> Iterator[dict]:
    """Yields records sorted by image id; classes are numbered from 0 in the order of their ids.

    Args:
        content: result of :func:`read_instances`; its lists become part of the records.
        image_root: folder to which the image names are relative.

    Raises:
        LookupError, TypeError, ValueError: if Detectron2 could not load the content either.
    """
    numbers = {key: i for i, key in enumerate(sorted(c["id"] for c in content["categories"]))}
    images = {image["id"]: image for image in content["images"]}
    items = defaultdict(list)
    for item in content.get("annotations", ()):
        items[item["image_id"]].append(item)
    ids = [item["id"] for key in images for item in items.get(key, ())]
    if len(set(ids)) < len(ids):
        raise ValueError("annotation ids occur twice")
    lost = len(content.get("annotations", ())) - len(ids)
    if lost:
        logger.warning(f"{lost} annotations are of images that the file does not list")
    without = 0
    for key in sorted(images):
        image = images[key]
        things = [_object(item, numbers) for item in items.get(key, ())]
        usable = [thing for thing in things if thing is not None]
        without += len(things) - len(usable)
        yield {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": key,
            "annotations": usable,
        }
    if without:
        logger.warning(f"{without} objects are skipped: their masks have no valid polygon")


def image_names(content: dict) -> list[str]:
    """Returns the names of the images that have one, as written in the file."""
    names = (image.get("file_name") for image in content["images"])
    return [name for name in names if isinstance(name, str) and name]


@dataclass(frozen=True)
class CocoSource:
    """A data set in COCO format, as its metadata describe it.

    Attributes:
        json_file: path of the annotation file.
        image_root: folder to which the image names are relative.
    """

    json_file: str
    image_root: str

    @property
    def label(self) -> str:
        return Path(self.json_file).stem

    def digest(self) -> str:
        """Returns a digest of all that the records depend on: the file's bytes, and the paths.

        Raises:
            OSError: if the file cannot be read.
        """
        with open_regular(self.json_file) as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        key = json.dumps([self.json_file, self.image_root, content])
        return hashlib.sha256(key.encode()).hexdigest()

    def read(self) -> dict:
        """See :func:`read_instances`."""
        return read_instances(self.json_file)

    def convert(self, content: dict) -> tuple[Iterator[dict], dict, list[str]]:
        """Returns records of a file's content, facts that a run needs, and the image names."""
        facts = {
            "classes": class_names(content),
            "ids": sorted(category["id"] for category in content["categories"]),
            "objects": len(content.get("annotations", ())),
        }
        return make_records(content, self.image_root), facts, image_names(content)
