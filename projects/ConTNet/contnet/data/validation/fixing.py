"""Fixes clear errors in an annotation file in COCO format; each step counts its fixes.

What would need a guess (which of two images with one id an annotation belongs to, whether a crowd
is one object) is not changed, and is reported by the doctor.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import pycocotools.mask as mask_util

from contnet.data.datasets.coco import as_whole, describe_value, is_whole
from contnet.data.datasets.image_files import find_missing, match_names
from contnet.data.findings import Findings
from contnet.data.pipeline.images import read_size
from contnet.data.validation.coco import NAME_KEYS, is_size, is_stray
from contnet.data.validation.geometry import Geometry, is_far
from contnet.data.validation.masks import are_numbers, flatten_polygons, is_mask_of, usable_polygons
from contnet.utils.errors import UserError

__all__ = ["MAPPING", "fix_content"]

MAPPING = "contnet_fix"  # key under which the copy lists old and new ids


@dataclass
class _Fix:
    """A file that is being fixed.

    Attributes:
        content: content of the file, which is changed in place.
        root: its image folder.
        masks: whether objects need masks.
        done: number of fixes, by description.
    """

    content: dict
    root: str
    masks: bool
    done: Counter = field(default_factory=Counter)

    @property
    def images(self) -> list[dict]:
        return self.content["images"]

    @property
    def annotations(self) -> list[dict]:
        return self.content.get("annotations", [])

    def keep(self, key: str, good: Callable[[dict], bool], what: str) -> None:
        """Removes entries of a list of the file that are not good."""
        if key in self.content:
            kept = [entry for entry in self.content[key] if good(entry)]
            self.done[what] += len(self.content[key]) - len(kept)
            self.content[key] = kept


# --- images --------------------------------------------------------------------------------------


def _drop_copies(fix: _Fix) -> None:
    """Removes entries that are identical to an earlier one, including the id."""
    for key in ("images", "annotations", "categories"):
        seen: dict[str, set[str]] = defaultdict(set)
        # Few ids occur twice, and only such entries are serialised.
        often = Counter(describe_value(entry.get("id")) for entry in fix.content.get(key, ()))

        def is_new(entry: dict, seen: dict = seen, often: Counter = often) -> bool:
            number = describe_value(entry.get("id"))
            if "id" not in entry or often[number] == 1:
                return True
            text = json.dumps(entry, sort_keys=True)
            new = text not in seen[number]
            seen[number].add(text)
            return new

        fix.keep(key, is_new, f"{key} that are exact duplicates: removed")


def _name_images(fix: _Fix) -> None:
    for image in fix.images:
        if isinstance(image.get("file_name"), str) and image["file_name"]:
            continue
        if is_whole(image.get("file_name")):
            image["file_name"] = str(image["file_name"])
            fix.done["image names that were numbers: converted to strings"] += 1
            continue
        names = [image[key] for key in NAME_KEYS if isinstance(image.get(key), str)]
        if names:
            image["file_name"] = names[0]
            fix.done["images whose file_name had another key: renamed"] += 1


def _match_images(fix: _Fix) -> None:
    names = [name for image in fix.images if isinstance(name := image.get("file_name"), str)]
    missing = find_missing(fix.root, names)
    matches = match_names(fix.root, missing, names)
    for image in fix.images:
        if match := matches.get(str(image.get("file_name"))):
            image["file_name"] = match.path
            fix.done[f"image names ({match.difference}): changed to those in the folder"] += 1


def _drop_images(fix: _Fix) -> None:
    """Removes images without a file, and their annotations.

    Raises:
        UserError: if no image has a file.
    """
    names = [str(image.get("file_name") or "") for image in fix.images]
    lost = {*find_missing(fix.root, names), *filter(is_stray, names), ""}
    if names and lost.issuperset(names):
        raise UserError(f"none of its {len(names)} images is in {fix.root}: check the folder")
    ids = {image["id"] for image, name in zip(fix.images, names, strict=True) if name in lost}
    ids -= {image["id"] for image, name in zip(fix.images, names, strict=True) if name not in lost}
    what = "images without a file, or files of macOS or Windows: removed"
    fix.keep("images", lambda image: str(image.get("file_name") or "") not in lost, what)
    what = "annotations of these images: removed"
    fix.keep("annotations", lambda item: item["image_id"] not in ids, what)


def _size_images(fix: _Fix) -> None:
    for image in fix.images:
        if is_size(image.get("width"), image.get("height")):
            continue
        size = [as_whole(image.get(key)) or 0 for key in ("width", "height")]
        if is_size(*size):
            fix.done["image sizes that were not integers: converted"] += 1
        else:
            try:
                path = os.path.join(fix.root, image["file_name"])
                size = read_size({"file_name": path}, max_pixels=0)[:2]
            except UserError:  # damaged, which the doctor reports
                continue
            fix.done["missing image sizes: read from the images"] += 1
        image["width"], image["height"] = size


# --- ids -----------------------------------------------------------------------------------------


def _key(value: object) -> tuple[str, object]:
    """Returns a dict key for an id that is not an integer; 1.0 and "1" have different keys."""
    return type(value).__name__, value if isinstance(value, (float, str)) else None


def _new_ids(values: list) -> dict[tuple, int]:
    """Returns an integer for each id that is not one: its numeric value, if that is free."""
    taken = {value for value in values if is_whole(value)}
    others = dict.fromkeys(_key(value) for value in values if isinstance(value, (float, str)))
    free = max([*taken, *(as_whole(value) or 0 for _, value in others), 0]) + 1
    new: dict[tuple, int] = {}
    for key in others:
        number = as_whole(key[1])
        if number is None or number in taken:
            number, free = free, free + 1
        new[key] = number
        taken.add(number)
    return new


def _number_entries(fix: _Fix, key: str, reference: str) -> None:
    """Converts the ids of a list, and the annotations' references to them, to integers."""
    entries = fix.content[key]
    new = _new_ids([entry.get("id") for entry in entries])
    free = max([*new.values(), *(e["id"] for e in entries if is_whole(e.get("id"))), 0]) + 1
    for entry in entries:
        if is_whole(entry.get("id")):
            continue
        if (number := new.get(_key(entry.get("id")))) is None:  # it has no id
            number, free = free, free + 1
        entry["id"] = number
        fix.done[f"ids of {key} that were not integers: converted"] += 1
    kept = [[value, number] for (_, value), number in new.items()]
    if kept:
        fix.content.setdefault(MAPPING, {})[f"{key}: [id before, id now]"] = kept
    ids = {entry["id"] for entry in entries}
    for item in fix.annotations:
        value = item.get(reference)
        number = new.get(_key(value), value if is_whole(value) else as_whole(value))
        if number in ids and not (is_whole(value) and value == number):
            item[reference] = number
            fix.done[f"{reference} of annotations that were not integers: converted"] += 1


def _number_images(fix: _Fix) -> None:
    _number_entries(fix, "images", "image_id")
    referred = {item.get("image_id") for item in fix.annotations if is_whole(item.get("image_id"))}
    counts = Counter(image["id"] for image in fix.images)
    free, seen = max(counts, default=0) + 1, set()
    for image in fix.images:
        if image["id"] in seen and image["id"] not in referred:
            image["id"], free = free, free + 1
            fix.done["image ids that occurred twice, without annotations: renumbered"] += 1
        seen.add(image["id"])


def _number_categories(fix: _Fix) -> None:
    _number_entries(fix, "categories", "category_id")


def _number_annotations(fix: _Fix) -> None:
    ids = [item.get("id") for item in fix.annotations]
    new: list[list] = []
    seen = {0}  # counts as missed in COCO's evaluation
    free = max((number for number in map(as_whole, ids) if number), default=0) + 1
    for item, old in zip(fix.annotations, ids, strict=True):
        number = as_whole(old)
        if number is None or number in seen:
            number, free = free, free + 1
        seen.add(number)
        if not is_whole(old) or number != old:
            item["id"] = number
            new.append([old, number])
    fix.done["annotation ids that were 0, duplicate or not integers: renumbered"] += len(new)
    if new:
        fix.content.setdefault(MAPPING, {})["annotations: [id before, id now]"] = new


def _drop_unlisted(fix: _Fix) -> None:
    ids = {image["id"] for image in fix.images}
    what = "annotations of images that are not listed: removed"
    fix.keep("annotations", lambda x: is_whole(x.get("image_id")) and x["image_id"] in ids, what)


# --- objects -------------------------------------------------------------------------------------


def _as_number(value: object) -> object:
    """Returns the number that a string spells, also within lists; other values are unchanged."""
    if isinstance(value, list):
        return [_as_number(each) for each in value]
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return value
    return number if math.isfinite(number) else value


def _read_texts(fix: _Fix) -> None:
    for item in fix.annotations:
        for key in ("bbox", "area", "segmentation"):
            value = item.get(key)
            if key == "segmentation" and not isinstance(value, list):
                continue
            if (read := _as_number(value)) != value:
                item[key] = read
                fix.done[f"{key} with strings instead of numbers: converted"] += 1


def _mark_crowds(fix: _Fix) -> None:
    for item in fix.annotations:
        given = item.get("iscrowd")
        if is_whole(given) and given in (0, 1):
            continue
        if given is None or as_whole(given) in (0, 1) or isinstance(given, bool):
            item["iscrowd"] = int(as_whole(given) or given is True)
            fix.done["iscrowd that was missing, a string or true/false: set to 0 or 1"] += 1


def _clean_polygons(fix: _Fix) -> None:
    for item in fix.annotations:
        mask = item.get("segmentation")
        if not isinstance(mask, list):
            continue
        if flat := flatten_polygons(mask):
            item["segmentation"] = mask = flat
            fix.done["masks of points or of one list of numbers: converted to polygons"] += 1
        parts = [part for part in mask if isinstance(part, list) and are_numbers(part)]
        kept = usable_polygons(parts)
        if lost := len(mask) - len(kept):
            fix.done["polygons with too few, an odd number of or no numbers: removed"] += lost
            item["segmentation"] = kept
        if not item["segmentation"]:
            del item["segmentation"]
            item["_lost"] = bool(mask)
    if fix.masks:
        what = "objects without a remaining mask: removed"
        fix.keep("annotations", lambda item: not item.get("_lost"), what)
    for item in fix.annotations:
        item.pop("_lost", None)


def _encode(item: dict, sizes: dict) -> dict | None:
    """Returns the run-length mask of an object, or None if it has no valid mask."""
    mask, size = item.get("segmentation"), sizes.get(item["image_id"])
    if not mask or size is None:
        return None
    if isinstance(mask, dict):
        if not is_mask_of(mask, size):
            return None
        coded = isinstance(mask["counts"], str)
        return mask if coded else mask_util.frPyObjects(mask, *mask["size"])
    if not isinstance(mask, list):
        return None
    width, height = size
    # Far outside there is no mask to measure, and the doctor reports that.
    if any(is_far(min(part), max(part), max(size)) for part in mask):
        return None
    return mask_util.merge(mask_util.frPyObjects(mask, height, width))


def _is_box(box: object) -> bool:
    try:
        return len(box) == 4 and are_numbers(box) and min(box[2:]) > 0
    except TypeError:  # it is not a list
        return False


def _sizes(fix: _Fix) -> dict:
    return {
        image["id"]: (image["width"], image["height"])
        for image in fix.images
        if is_size(image.get("width"), image.get("height"))
    }


def _box_objects(fix: _Fix) -> None:
    sizes = _sizes(fix)
    for item in fix.annotations:
        if _is_box(item.get("bbox")):
            continue
        coded = _encode(item, sizes)
        if coded is not None and _is_box(box := mask_util.toBbox(coded).tolist()):
            item["bbox"] = box
            fix.done["boxes that were missing or had no area: computed from masks"] += 1

    def is_usable(item: dict) -> bool:
        if not _is_box(item.get("bbox")):
            return False
        x, y, width, height = item["bbox"]
        size = sizes.get(item["image_id"], (math.inf, math.inf))
        return x < size[0] and y < size[1] and x + width > 0 and y + height > 0

    fix.keep("annotations", is_usable, "objects without a box in their image: removed")


def _wrong_areas(fix: _Fix, sizes: dict) -> set[int]:
    """Returns the ids of the objects whose areas the doctor doubts."""
    geometry = Geometry(Findings(), evaluated=True)
    geometry.doubtful_areas = []
    for item in fix.annotations:
        mask, size = item.get("segmentation"), sizes.get(item["image_id"])
        if size and (not mask or _encode(item, sizes) is not None):
            geometry.add(item, size)
    geometry.finish()
    return {item["id"] for item in geometry.doubtful_areas}


def _compute_areas(fix: _Fix) -> None:
    sizes = _sizes(fix)
    wrong = _wrong_areas(fix, sizes)
    for item in fix.annotations:
        area = item.get("area")
        number = are_numbers([area]) and area >= 0
        if number and item["id"] not in wrong:
            continue
        coded = _encode(item, sizes)
        width, height = item["bbox"][2:]
        item["area"] = width * height if coded is None else float(mask_util.area(coded))
        source = "boxes" if coded is None else "masks"
        what = "were wrong" if number else "were missing or not numbers"
        fix.done[f"areas that {what}: computed from {source}"] += 1


# The order matters: later steps rely on earlier ones.
_STEPS: tuple[Callable[[_Fix], None], ...] = (
    _drop_copies,
    _name_images,
    _number_images,
    _number_categories,
    _drop_unlisted,
    _match_images,
    _drop_images,
    _number_annotations,
    _size_images,
    _read_texts,
    _mark_crowds,
    _clean_polygons,
    _box_objects,
    _compute_areas,
)


def fix_content(content: dict, root: str, masks: bool) -> Counter:
    """Fixes an annotation file's content in place.

    Args:
        content: dict with lists of dicts "images" and "categories", and maybe "annotations".
        root: its image folder.
        masks: whether to remove objects whose mask has no usable polygon.

    Returns:
        The number of fixes, by description. The old and new ids are in the content, under
        ``MAPPING``.

    Raises:
        UserError: if none of the images is in the folder.
    """
    fix = _Fix(content, root, masks)
    for step in _STEPS:
        step(fix)
    return +fix.done
