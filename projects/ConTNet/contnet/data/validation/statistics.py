"""Statistics of a data set: classes, sizes, shapes and numbers of objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from detectron2.structures import BoxMode

from contnet.data.pipeline.images import read_labels

__all__ = ["DatasetStatistics", "count_in_bins", "count_pixels", "read_statistics"]

_LABEL_MAPS = 200  # maximum number of label maps whose pixels are counted


@dataclass
class DatasetStatistics:
    """Counts of a data set.

    Attributes:
        images: number of images.
        empty: number of images without objects; None for labelled images and label maps.
        classes: number of objects, images or pixels by class name, including zeros.
        counted: what ``classes`` counts.
        sizes: square root of each object's box area, in pixels of the stored image.
        ratios: width / height of each object's box.
        objects: number of objects in each image.
        image_ratios: width / height of each image whose record has its size.
    """

    images: int = 0
    empty: int | None = None
    classes: dict[str, int] = field(default_factory=dict)
    counted: str = "objects"
    sizes: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    image_ratios: list[float] = field(default_factory=list)


def count_pixels(files: Sequence[str], classes: int, most: int = _LABEL_MAPS) -> np.ndarray:
    """Counts pixels by class, (classes,), in at most ``most`` label maps spread over the files."""
    step = max(1, -(-len(files) // most))
    counts = np.zeros(256, dtype=np.int64)
    for file in files[::step]:
        counts += np.bincount(read_labels(file).ravel(), minlength=256)
    return counts[:classes]


def read_statistics(records: Iterable[dict], class_names: Sequence[str]) -> DatasetStatistics:
    """Counts the content of a data set's records.

    Args:
        records: Detectron2's data set dicts, with objects, label maps or labels.
        class_names: in the model's order.
    """
    found, counts, label_maps = DatasetStatistics(), Counter(), []
    for record in records:
        found.images += 1
        if "width" in record and record["height"]:
            found.image_ratios.append(record["width"] / record["height"])
        if "label" in record:
            found.counted = "images"
            counts[record["label"]] += 1
        elif "sem_seg_file_name" in record:
            label_maps.append(record["sem_seg_file_name"])
        elif "annotations" in record:
            objects = [each for each in record["annotations"] if not each.get("iscrowd", 0)]
            found.objects.append(len(objects))
            for each in objects:
                counts[each["category_id"]] += 1
                box = BoxMode.convert(each["bbox"], each["bbox_mode"], BoxMode.XYWH_ABS)
                width, height = (max(float(side), 0.0) for side in box[2:])
                found.sizes.append((width * height) ** 0.5)
                found.ratios.append(width / height if height else float("inf"))
    if label_maps:
        found.counted = "pixels"
        counts.update(dict(enumerate(count_pixels(label_maps, len(class_names)).tolist())))
    if found.objects:
        found.empty = found.objects.count(0)
    found.classes = {name: counts[index] for index, name in enumerate(class_names)}
    return found


def count_in_bins(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """Counts values below the first edge, between neighbouring edges, and from the last edge on."""
    places = np.searchsorted(np.asarray(edges, float), np.asarray(values, float), side="right")
    return np.bincount(places, minlength=len(edges) + 1).tolist()
