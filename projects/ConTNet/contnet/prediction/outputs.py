"""Writes predictions: a JSON file in COCO's results format, images, and an HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from contnet.evaluation.coco_ap import encode_masks
from contnet.prediction.inputs import Input
from contnet.report.page import ContactSheet, Facts, Thumbnail, write_page
from contnet.utils.files import atomic_write

__all__ = [
    "PAGE",
    "RESULTS",
    "category_ids",
    "result_rows",
    "save_map",
    "save_picture",
    "write_contact_sheet",
    "write_results",
]

RESULTS = "predictions.json"
PAGE = "index.html"
_IMAGES = "images"
_MAPS = "maps"
_THUMBNAIL = 320  # pixels of the longer side
_MOST_SHOWN = 500  # maximum number of thumbnails


def category_ids(class_names: Sequence[str], categories: Mapping[str, int]) -> list[int] | None:
    """Returns the ids of the model's classes in a COCO file; without a file, their indices.

    Returns:
        The ids in the order of the classes; None if the file lacks one of them.
    """
    if not categories:
        return list(range(len(class_names)))
    ids = [categories.get(name) for name in class_names]
    return None if None in ids else ids


def _detections(image: dict, found: dict, ids: Sequence[int]) -> list[dict]:
    rows = []
    masks = encode_masks(torch.from_numpy(found["masks"])) if "masks" in found else None
    for index, (x0, y0, x1, y1) in enumerate(found["boxes"].tolist()):
        row = {
            **image,
            "category_id": ids[found["classes"][index]],
            "category_name": found["names"][index],
            "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
            "score": round(float(found["scores"][index]), 5),
        }
        if masks is not None:
            row["segmentation"] = masks[index]
        rows.append(row)
    return rows


def result_rows(
    image_id: int | str, name: str, found: dict, class_names: Sequence[str], ids: Sequence[int]
) -> list[dict]:
    """Returns an image's rows of the results file, in COCO's format if there is one for the task.

    Args:
        image_id: id of the image.
        name: name of its outputs.
        found: output of :class:`contnet.prediction.predictor.Predictor`.
        class_names: class names of the model.
        ids: ids of its classes, from :func:`category_ids`.
    """
    image = {"image_id": image_id}
    if "boxes" in found:
        return _detections(image, found, ids)
    if "semantic" in found:
        numbers, counts = np.unique(found["semantic"], return_counts=True)
        shares = counts / found["semantic"].size
        classes = {class_names[n]: round(float(s), 5) for n, s in zip(numbers, shares, strict=True)}
        return [{**image, "map": f"{_MAPS}/{name}.png", "classes": classes}]
    classes = [
        {
            "category_id": ids[number],
            "category_name": class_name,
            "score": round(float(score), 5),
        }
        for number, class_name, score in zip(
            found["classes"], found["names"], found["scores"], strict=True
        )
    ]
    return [{**image, "classes": classes}]


def _path(folder: Path, kind: str, file: str) -> Path:
    path = folder / kind / file
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save_map(folder: Path, name: str, found: dict) -> None:
    """Saves a map of class indices as a PNG, with 8 bits if they fit."""
    semantic = found["semantic"]
    kind = np.uint8 if semantic.max(initial=0) < 256 else np.uint16
    Image.fromarray(semantic.astype(kind)).save(_path(folder, _MAPS, f"{name}.png"))


def save_picture(folder: Path, image: Input, drawn: np.ndarray, caption: str) -> Thumbnail:
    """Saves a drawn image; returns its thumbnail for the page.

    Args:
        folder: output folder.
        image: the input that was drawn.
        drawn: uint8 RGB (H, W, 3).
        caption: caption on the page.
    """
    path = _path(folder, _IMAGES, f"{image.name}.jpg")
    picture = Image.fromarray(drawn)
    picture.save(path, quality=90)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return Thumbnail(image.name, path.relative_to(folder).as_posix(), np.asarray(picture), caption)


def write_results(folder: Path, rows: Sequence[dict]) -> Path:
    """Writes the results of all images; returns the file's path."""
    path = folder / RESULTS
    with atomic_write(path, "w") as file:
        json.dump(rows, file)
    return path


def write_contact_sheet(
    folder: Path, title: str, facts: Mapping[str, object], thumbnails: Sequence[Thumbnail]
) -> Path:
    """Writes a page of thumbnails, which link to the images; returns its path."""
    heading = "Images"
    if len(thumbnails) > _MOST_SHOWN:
        heading = f"The first {_MOST_SHOWN} of {len(thumbnails)} images"
    sheet = ContactSheet(heading, thumbnails[:_MOST_SHOWN])
    return write_page(folder / PAGE, title, [Facts("Prediction", facts), sheet])
