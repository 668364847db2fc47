"""Records of Detectron2's form from the content of an annotation file of COCO's form.

They equal what Detectron2's ``load_coco_json`` makes of the file. That one reads it again; here the
content that was checked is used.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator

import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

__all__ = ["make_records"]

_KEPT = ("iscrowd", "bbox", "keypoints", "category_id")

logger = logging.getLogger(__name__)


def _mask(mask: list | dict) -> list | dict:
    """A segmentation without what is no polygon, compressed if it is run-length."""
    if isinstance(mask, list):
        return [polygon for polygon in mask if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if isinstance(mask["counts"], list):
        return mask_util.frPyObjects(mask, *mask["size"])
    return mask


def _keypoints(values: list) -> list:
    """x, y, visibility, ...: pixel numbers become coordinates of the pixels' centres."""
    return [value if i % 3 == 2 else value + 0.5 for i, value in enumerate(values)]


def _object(item: dict, numbers: dict) -> dict | None:
    """One annotation; None if it has a mask and nothing of it is a polygon."""
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
    """Records in the order of the images' ids; classes count from 0 in the order of theirs.

    Args:
        content: of :func:`contnet.data.validation.coco.read_instances`; its lists become part of the
            records.
        image_root: what goes before the names of the images.

    Raises:
        LookupError, TypeError, ValueError: for what Detectron2 cannot load either.
    """
    numbers = {key: i for i, key in enumerate(sorted(c["id"] for c in content["categories"]))}
    images = {image["id"]: image for image in content["images"]}
    items = defaultdict(list)
    for item in content["annotations"]:
        items[item["image_id"]].append(item)
    ids = [item["id"] for key in images for item in items.get(key, ())]
    if len(set(ids)) < len(ids):
        raise ValueError("annotation ids occur twice")
    lost = len(content["annotations"]) - len(ids)
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
        logger.warning(f"{without} objects are left out: nothing of their masks is a polygon")
