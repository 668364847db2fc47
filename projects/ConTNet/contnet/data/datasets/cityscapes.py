"""Cityscapes' layout on the disk.

Each image ``leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png`` has its files
``gtFine/SPLIT/CITY/NAME_gtFine_*``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GT_FILES", "IMAGE_SUFFIX", "Scene", "find_scenes", "sorted_scenes"]

# What Detectron2 reads of gtFine, in training or evaluation, by type of data set.
GT_FILES = {
    "cityscapes_instance": ("polygons.json", "instanceIds.png", "labelIds.png"),
    "cityscapes_sem_seg": ("polygons.json", "labelTrainIds.png", "labelIds.png", "instanceIds.png"),
}

IMAGE_SUFFIX = "_leftImg8bit.png"


@dataclass(frozen=True)
class Scene:
    """An image and its label files.

    Attributes:
        image: path of the image.
        labels: paths by the end of their name, such as "labelIds.png".
    """

    image: Path
    labels: dict[str, Path]


def find_scenes(image_dir: str, gt_dir: str, kind: str) -> list[Scene]:
    """The images of a split, in order.

    Args:
        image_dir: ``leftImg8bit/SPLIT``.
        gt_dir: ``gtFine/SPLIT``.
        kind: a key of ``GT_FILES``.
    """
    scenes = []
    for image in sorted(Path(image_dir).glob(f"*/*{IMAGE_SUFFIX}")):
        stem = Path(gt_dir, image.parent.name, image.name.removesuffix(IMAGE_SUFFIX))
        labels = {end: Path(f"{stem}_gtFine_{end}") for end in GT_FILES[kind]}
        scenes.append(Scene(image, labels))
    return scenes


def sorted_scenes(records: Iterable[dict]) -> list[dict]:
    """Records of Cityscapes by their names.

    Detectron2 lists folders, whose order is each file system's own: machines with copies of the
    data would otherwise not agree on which image is the tenth.
    """
    return sorted(records, key=lambda record: record["file_name"])
