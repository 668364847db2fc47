"""What can be wrong in an annotation file of COCO's form, told without opening an image.

The severities follow what Detectron2 does: what stops it, or gives wrong targets, is an error; an
object that it leaves out is one unless it is rare (COCO's own file has two boxes without area).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from contnet.data.datasets.coco import class_names, is_whole
from contnet.data.findings import Findings
from contnet.utils.text import plural

__all__ = ["DatasetUse", "check_instances", "is_far", "is_size"]

_IDS = ("id", "image_id", "category_id")
# COCO's own boxes reach out by rounding.
_ROUNDING = 1.0


@dataclass(frozen=True)
class DatasetUse:
    """What a run wants of a data set.

    Attributes:
        trained: it is one of DATASETS.TRAIN.
        evaluated: it is one of DATASETS.TEST.
        masks: MODEL.MASK_ON.
        bitmasks: INPUT.MASK_FORMAT is bitmask.
    """

    trained: bool
    evaluated: bool
    masks: bool
    bitmasks: bool


def is_size(width: object, height: object) -> bool:
    """Whether two values can be an image's width and height."""
    return is_whole(width) and is_whole(height) and min(width, height) > 0


def is_far(low: float, high: float, side: int) -> bool:
    """Whether coordinates leave an image by more than half of its side."""
    return low < -0.5 * side or high > 1.5 * side


def _are_numbers(values: Iterable) -> bool:
    """Whether all are finite numbers."""
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _check_images(images: list[dict], findings: Findings) -> dict:
    """(width, height) of the images by id."""
    sizes, names = {}, set()
    for image in images:
        name, key = image.get("file_name"), image.get("id")
        width, height = image.get("width"), image.get("height")
        if not isinstance(key, (int, str)) or not isinstance(name, str) or not name:
            findings.error("images without an id or a file_name", str(image)[:80])
            continue
        if not is_size(width, height):
            findings.error("images whose width and height are no whole numbers above 0", name)
            continue
        if key in sizes:
            findings.error("image ids that occur twice", str(key))
        if name in names:
            findings.note("files that are listed twice, as different images", name)
        sizes[key] = (width, height)
        names.add(name)
    if len({type(key) for key in sizes}) > 1:
        findings.error("some image ids are numbers, some are texts: Detectron2 cannot sort them")
    return sizes


def _check_box(box: object, size: tuple, where: str, findings: Findings) -> None:
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        findings.error("boxes that are not 4 finite numbers x, y, width, height", where)
        return
    x, y, width, height = box
    if width < 0 or height < 0:
        findings.error("boxes with a negative width or height", where)
    elif width == 0 or height == 0:
        findings.lost("boxes without area", where)
    elif x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0:
        findings.lost("boxes wholly outside their image", where)
    elif is_far(x, x + width, size[0]) or is_far(y, y + height, size[1]):
        findings.error(
            "boxes far larger than their image: x, y, width, height are wanted, in its pixels",
            where,
        )
    elif min(x, y, size[0] - x - width, size[1] - y - height) < -_ROUNDING:
        findings.note("boxes that reach outside their image, where they are cut", where)


def _check_polygons(polygons: list, size: tuple, where: str, findings: Findings) -> None:
    for polygon in polygons:
        if not isinstance(polygon, list) or not _are_numbers(polygon):
            findings.error("polygons that are no lists [x, y, x, y, ...] of finite numbers", where)
        elif len(polygon) % 2:
            findings.lost("polygons with an odd number of coordinates", where)
        elif len(polygon) < 6:
            findings.lost("polygons of fewer than 3 points", where)
        else:
            xs, ys = polygon[::2], polygon[1::2]
            if is_far(min(xs), max(xs), size[0]) or is_far(min(ys), max(ys), size[1]):
                findings.error("polygons that reach far outside their image", where)


def _is_short(polygon: object) -> bool:
    return isinstance(polygon, list) and len(polygon) < 6


def _run_lengths(counts: str) -> list[int]:
    """The runs of a compressed mask: in digits of 5 bits, from the fourth on as the difference to
    the last but one.
    """
    runs, value, shift = [], 0, 0
    for letter in counts:
        digit = ord(letter) - 48
        if not 0 <= digit < 64:
            raise ValueError("a letter that no compressed mask has")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("cut off")
    return runs


def _is_mask_of(mask: dict, size: tuple) -> bool:
    """Whether a run-length mask fits an image of (width, height)."""
    width, height = size
    counts = mask.get("counts")
    if mask.get("size") != [height, width]:
        return False
    try:
        runs = _run_lengths(counts) if isinstance(counts, str) else counts
        return min(runs) >= 0 and sum(runs) == width * height
    except (TypeError, ValueError):
        return False


def _check_mask(item: dict, size: tuple, use: DatasetUse, where: str, findings: Findings) -> None:
    mask = item.get("segmentation")
    if not mask:
        if use.masks and (use.evaluated or not item.get("iscrowd")):
            findings.error(
                "objects without a mask, which MODEL.MASK_ON needs: set MODEL.MASK_ON False, or "
                "take a detector of boxes",
                where,
            )
    elif isinstance(mask, dict):
        if not _is_mask_of(mask, size):
            findings.error("run-length masks that do not fit their image's size", where)
        elif use.masks and use.trained and not use.bitmasks and not item.get("iscrowd"):
            findings.error("run-length masks of objects: set INPUT.MASK_FORMAT bitmask", where)
    elif isinstance(mask, list):
        _check_polygons(mask, size, where, findings)
        if use.evaluated and use.masks and any(_is_short(polygon) for polygon in mask):
            findings.error("polygons of fewer than 3 points, which evaluation takes wrongly", where)
    else:
        findings.error("masks that are neither polygons nor run-length", where)


def _check_marks(item: dict, use: DatasetUse, where: str, findings: Findings) -> None:
    """Checks what says how an object counts."""
    if use.evaluated and (missing := [key for key in ("area", "iscrowd") if key not in item]):
        findings.error(f"annotations without {', '.join(missing)}, which evaluation needs", where)
    if item.get("iscrowd", 0) not in (0, 1):
        findings.error("annotations whose iscrowd is neither 0 nor 1", where)
    area = item.get("area", 0)
    if use.evaluated and not (_are_numbers([area]) and area >= 0):
        findings.error("annotations whose area is no number from 0", where)
    if item.get("ignore"):
        findings.error('annotations with "ignore", which Detectron2 refuses: use iscrowd', where)


def _check_annotation(
    item: dict, sizes: dict, categories: set, use: DatasetUse, findings: Findings
) -> bool:
    """Checks one object that has its ids; returns whether it can be one to train on."""
    where = f"annotation {item['id']} of image {item['image_id']}"
    _check_marks(item, use, where, findings)
    if item["category_id"] not in categories:
        findings.error("annotations of categories that the file does not list", where)
    size = sizes.get(item["image_id"])
    if size is None:
        findings.lost("annotations of images that the file does not list", where)
        return False
    _check_box(item.get("bbox"), size, where, findings)
    _check_mask(item, size, use, where, findings)
    return not item.get("iscrowd")


def _check_annotations(content: dict, sizes: dict, use: DatasetUse, findings: Findings) -> None:
    annotations = content["annotations"]
    categories = {category["id"] for category in content["categories"]}
    seen, with_objects, used = set(), set(), set()
    usable = 0
    for item in annotations:
        if missing := [key for key in _IDS if not isinstance(item.get(key), (int, str))]:
            findings.error(f"annotations without {', '.join(missing)}", str(item)[:80])
            continue
        usable += _check_annotation(item, sizes, categories, use, findings)
        if item["id"] in seen:
            findings.error("annotation ids that occur twice", str(item["id"]))
        seen.add(item["id"])
        with_objects.add(item["image_id"])
        used.add(item["category_id"])
    findings.settle(len(annotations))
    if use.trained and not usable:
        findings.error("it has no object to train on")
    if use.evaluated and 0 in seen:
        findings.note("the annotation id 0 counts as missed in COCO's evaluation: number from 1")
    if annotations and all(_is_relative(item.get("bbox")) for item in annotations):
        findings.error("all boxes lie between 0 and 1: they must be in pixels")
    if empty := len(sizes.keys() - with_objects):
        findings.note(f"{empty} of {len(sizes)} images have no objects")
    for category in content["categories"]:
        if annotations and category["id"] not in used:
            findings.note("classes without objects", category["name"])


def _is_relative(box: object) -> bool:
    return isinstance(box, list) and _are_numbers(box) and max(box, default=2) <= 1


def check_instances(content: dict, use: DatasetUse, findings: Findings) -> None:
    """Checks the content of an annotation file.

    Args:
        content: of :func:`read_instances`.
        use: what the run wants of it.
        findings: gets what is found, with the names of the classes.

    Raises:
        UserError: if its categories cannot be used.
    """
    names = class_names(content)
    findings.classes["objects"] = names
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    findings.facts.append(
        f"{plural(len(content['images']), 'image')}, "
        f"{plural(len(content['annotations']), 'object')}, "
        f"{plural(len(names), 'class')} ({shown})"
    )
    if len(set(names)) < len(names):
        findings.note("some classes have the same name")
    if not content["images"]:
        findings.error("its annotation file lists no image")
    sizes = _check_images(content["images"], findings)
    _check_annotations(content, sizes, use, findings)
