"""Checks an annotation file in COCO format without opening images.

The severities follow what Detectron2 does: what stops it, or gives wrong targets, is an error; so
is an object that it leaves out, unless that is rare (COCO's own file has two boxes without area).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container

from contnet.data.datasets.coco import as_whole, class_names, describe_value, is_whole
from contnet.data.findings import Findings
from contnet.data.validation.geometry import Geometry, describe_object, is_far
from contnet.data.validation.left_out import CROWD, LeftOut
from contnet.data.validation.masks import (
    FIX_HINT,
    DatasetUse,
    are_numbers,
    check_mask,
    is_text_of_numbers,
    usable_polygons,
)
from contnet.utils.text import plural

__all__ = ["NAME_KEYS", "DatasetUse", "check_instances", "is_size", "is_stray"]

_NO_POLYGON = "object without a usable polygon"
_LARGEST = 2**31  # pixels of a side
_IDS = ("id", "image_id", "category_id")
# Keys under which converters write the name of an image.
NAME_KEYS = ("path", "filename", "fileName", "coco_url", "image", "name", "url")
_STRAYS = {"thumbs.db", ".ds_store", "desktop.ini"}
# COCO's own boxes exceed their images by rounding.
_ROUNDING = 1.0


def is_size(width: object, height: object) -> bool:
    """Whether two values can be an image's width and height."""
    sides = (width, height)
    return all(map(is_whole, sides)) and min(sides) > 0 and max(sides) < _LARGEST


def is_stray(name: str) -> bool:
    """Whether a file of that name is one that macOS or Windows puts beside images."""
    base = name.replace("\\", "/").rpartition("/")[2]
    return base.startswith("._") or base.lower() in _STRAYS


def _check_image_id(image: dict, where: str, findings: Findings) -> bool:
    """Checks the id of an image; returns whether it can be used as a key."""
    key = image.get("id")
    if is_whole(key) or isinstance(key, str):
        return True
    if as_whole(key) is not None:
        what = f"image ids that are not integers: {FIX_HINT}"
        findings.error(what, f"{describe_value(key)} ({where})")
        return True
    findings.error(f"images without an id: {FIX_HINT}", where)
    return False


def _check_image_name(image: dict, findings: Findings) -> None:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        other = next((key for key in NAME_KEYS if isinstance(image.get(key), str)), None)
        hint = f", they have {other!r} instead: {FIX_HINT}" if other else ""
        findings.error(f"images without a file_name{hint}", describe_value(image))
    elif is_stray(name):
        findings.error(
            "files of macOS or Windows that are listed as images (._*, Thumbs.db, ...): "
            "tools/doctor.py --fix removes them",
            name,
        )


def _check_image_size(image: dict, where: str, findings: Findings) -> tuple[int, int] | None:
    width, height = image.get("width"), image.get("height")
    if is_size(width, height):
        return width, height
    what = f"images whose width and height are not integers above 0: {FIX_HINT}"
    if is_size(as_whole(width) or 0, as_whole(height) or 0):
        what = (
            "images whose width and height are strings or have a decimal point, instead of "
            f"integers above 0: {FIX_HINT}"
        )
        where += f" ({describe_value(height if is_whole(width) else width)})"
    findings.error(what, where)
    return None


def _check_images(images: list[dict], findings: Findings) -> dict:
    """Returns (width, height) of the images by id; None in place of a wrong size."""
    sizes, names = {}, set()
    for image in images:
        name = image.get("file_name")
        where = name if isinstance(name, str) and name else describe_value(image)
        _check_image_name(image, findings)
        if isinstance(name, str) and name in names:
            findings.note("files that are listed twice, as different images", name)
        names.add(where)
        size = _check_image_size(image, where, findings)
        if not _check_image_id(image, where, findings):
            continue
        key = image["id"]
        if key in sizes:
            findings.error("image ids that occur twice", str(key))
        sizes[key] = size
    if len({isinstance(key, str) for key in sizes}) > 1:
        findings.error(
            f"some image ids are numbers, some are strings: Detectron2 cannot sort them, {FIX_HINT}"
        )
    return sizes


def _check_box(box: object, size: tuple, where: str, findings: Findings) -> str | None:
    """Checks a box.

    Returns:
        Why training leaves the object out; "" if it does not, None if the box is wrong.
    """
    if not isinstance(box, list) or len(box) != 4 or not are_numbers(box):
        texts = isinstance(box, list) and len(box) == 4 and is_text_of_numbers(box)
        hint = f", but strings: {FIX_HINT}" if texts else ""
        findings.error(f"boxes that are not 4 finite numbers x, y, width, height{hint}", where)
        return None
    x, y, width, height = box
    if width < 0 or height < 0:
        findings.error("boxes with a negative width or height", where)
        return None
    if width == 0 or height == 0:
        findings.lost("boxes without area", where)
        return "box without area"
    if x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0:
        findings.lost("boxes completely outside their image", where)
        return "box outside its image"
    if is_far(x, x + width, size[0]) or is_far(y, y + height, size[1]):
        findings.error(
            "boxes far larger than their image: they must be x, y, width, height in pixels",
            where,
        )
        return None
    if min(x, y, size[0] - x - width, size[1] - y - height) < -_ROUNDING:
        findings.note("boxes that reach outside their image, and are clipped", where)
    return ""


def _check_marks(item: dict, use: DatasetUse, where: str, findings: Findings) -> None:
    """Checks area, iscrowd and ignore, which decide how an object counts."""
    if use.evaluated and (missing := [key for key in ("area", "iscrowd") if key not in item]):
        what = f"annotations without {', '.join(missing)}, which evaluation requires: {FIX_HINT}"
        findings.error(what, where)
    if item.get("iscrowd", 0) not in (0, 1):
        findings.error(f"annotations whose iscrowd is neither 0 nor 1: {FIX_HINT}", where)
    area = item.get("area", 0)
    if use.evaluated and not (are_numbers([area]) and area >= 0):
        findings.error(f"annotations whose area is not a number of at least 0: {FIX_HINT}", where)
    if item.get("ignore"):
        findings.error('annotations with "ignore", which Detectron2 refuses: use iscrowd', where)


def _is_id(value: object) -> bool:
    return is_whole(value) or isinstance(value, str)


def _check_ids(item: dict, findings: Findings) -> bool:
    """Checks the ids of an annotation; returns whether none is missing."""
    wrong = [key for key in _IDS if not _is_id(item.get(key))]
    if not wrong:
        return True
    missing = [key for key in wrong if as_whole(item.get(key)) is None]
    if missing:
        findings.error(f"annotations without {', '.join(missing)}", describe_value(item))
        return False
    for key in wrong:
        findings.error(
            f"annotations whose {key} is not an integer: {FIX_HINT}",
            f"{describe_value(item[key])} in {describe_object(item)}",
        )
    return True


class _Listed:
    """Looks up ids of annotations in a list of the file.

    Args:
        ids: ids of the list's entries.
        key: key of the annotations that refers to them.
        what: what the entries are.
        findings: receives what is found.
    """

    def __init__(self, ids: Container, key: str, what: str, findings: Findings):
        self._ids = ids
        self._key = key
        self._what = what
        self._findings = findings
        self._numbers: dict[int | None, int | str] | None = None

    def find(self, item: dict) -> int | str | None:
        """Returns the id to which an annotation refers; adds an error if their types differ."""
        value = item[self._key]
        if value in self._ids:
            return value
        if self._numbers is None:
            self._numbers = {as_whole(each): each for each in self._ids}
        found = self._numbers.get(as_whole(value)) if as_whole(value) is not None else None
        if found is None:
            return None
        one, other = ("strings", "numbers") if isinstance(value, str) else ("numbers", "strings")
        self._findings.error(
            f"annotations whose {self._key} are {one}, while the ids of {self._what} are {other}, "
            f"which never match: {FIX_HINT}",
            f"{describe_value(value)} in {describe_object(item)}",
        )
        return found


class _Objects:
    """Checks objects one by one.

    Args:
        content: content of the file.
        sizes: result of :func:`_check_images`.
        use: how the run uses the data set.
        findings: receives what is found.

    Attributes:
        trainable: number of objects that are not crowds, in images that are listed.
        left_out: what training leaves out.
    """

    def __init__(self, content: dict, sizes: dict, use: DatasetUse, findings: Findings):
        self._sizes = sizes
        self._use = use
        self._findings = findings
        categories = {category["id"] for category in content["categories"]}
        self._images = _Listed(sizes, "image_id", "images", findings)
        self._categories = _Listed(categories, "category_id", "categories", findings)
        self._geometry = Geometry(findings, use.evaluated)
        self.left_out = LeftOut()
        self.trainable = 0

    def check(self, item: dict) -> None:
        """Checks an object that has its ids."""
        where = describe_object(item)
        _check_marks(item, self._use, where, self._findings)
        if self._categories.find(item) is None:
            self._findings.error("annotations of categories that the file does not list", where)
        key = self._images.find(item)
        if key is None:
            self._findings.lost("annotations of images that the file does not list", where)
            self.left_out.count(None, "object of an image that is not listed")
            return
        crowd = bool(item.get("iscrowd"))
        self.trainable += not crowd
        size = self._sizes.get(key)
        reason = self._check_shape(item, size, where) if size else ""
        self.left_out.count(key, CROWD if crowd else reason, stays=reason != _NO_POLYGON)

    def _check_shape(self, item: dict, size: tuple[int, int], where: str) -> str:
        """Checks box and mask; returns why training leaves the object out, "" if it does not."""
        reason = _check_box(item.get("bbox"), size, where, self._findings)
        if not check_mask(item, size, self._use, where, self._findings) or reason is None:
            return ""  # wrong, which is already reported
        mask = item.get("segmentation")
        if mask and isinstance(mask, list) and not usable_polygons(mask):
            return _NO_POLYGON
        if not reason:
            self._geometry.add(item, size)
        return reason

    def finish(self) -> None:
        """Adds findings that need all objects."""
        self._geometry.finish()


def _check_annotations(content: dict, sizes: dict, use: DatasetUse, findings: Findings) -> None:
    annotations = content["annotations"]
    objects = _Objects(content, sizes, use, findings)
    seen, with_objects, used = set(), set(), set()
    for item in annotations:
        if not _check_ids(item, findings):
            continue
        objects.check(item)
        if item["id"] in seen:
            findings.error("annotation ids that occur twice", str(item["id"]))
        seen.add(item["id"])
        with_objects.add(item["image_id"])
        used.add(item["category_id"])
    with_objects |= set(map(as_whole, with_objects))
    used |= set(map(as_whole, used))
    objects.finish()
    findings.settle(len(annotations))
    objects.left_out.check_crowds(use.evaluated, findings)
    if use.trained:
        objects.left_out.tell(len(sizes), use.filtered, findings)
    if use.trained and not objects.trainable:
        findings.error("it has no object to train on")
    if use.evaluated and 0 in seen:
        findings.warn(
            "the annotation id 0 counts as missed in COCO's evaluation, so AP is too low: "
            f"number from 1, {FIX_HINT}"
        )
    if annotations and all(_is_relative(item.get("bbox")) for item in annotations):
        findings.error("all boxes lie between 0 and 1: they must be in pixels")
    if empty := sum(not {key, as_whole(key)} & with_objects for key in sizes):
        findings.note(f"{empty} of {len(sizes)} images have no objects")
    for category in content["categories"]:
        if annotations and category["id"] not in used:
            findings.note("classes without objects", category["name"])


def _is_relative(box: object) -> bool:
    return isinstance(box, list) and are_numbers(box) and max(box, default=2) <= 1


def check_instances(content: dict, use: DatasetUse, findings: Findings) -> None:
    """Checks the content of an annotation file.

    Args:
        content: result of :func:`read_instances`.
        use: how the run uses the data set.
        findings: receives what is found, and the names of the classes.

    Raises:
        UserError: if its categories cannot be used.
    """
    names = class_names(content)
    findings.classes["objects"] = names
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    findings.fact(
        f"{plural(len(content['images']), 'image')}, "
        f"{plural(len(content.get('annotations', ())), 'object')}, "
        f"{plural(len(names), 'class')} ({shown})"
    )
    by_name = defaultdict(list)
    for category in content["categories"]:
        by_name[category["name"]].append(category["id"])
    for name, ids in by_name.items():
        if len(ids) > 1:
            what = "classes that have the same name, but are learned and evaluated separately"
            findings.warn(what, f"{name} (ids {', '.join(map(str, sorted(ids)))})")
    if not content["images"]:
        findings.error("its annotation file lists no image")
    sizes = _check_images(content["images"], findings)
    if use.trained and "annotations" not in content:
        findings.error("its annotation file has no 'annotations', so nothing can be learned")
    elif content.get("annotations") or use.trained:
        _check_annotations(content, sizes, use, findings)
    else:
        findings.fact("no ground truth: there are no annotations to evaluate with")
