"""Cityscapes' folder layout, and its records.

The label files of each image ``leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png`` are
``gtFine/SPLIT/CITY/NAME_gtFine_*``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

import detectron2
import shapely
from cityscapesscripts.helpers.labels import name2label
from detectron2.data import DatasetCatalog

from contnet.data.datasets.image_files import open_image
from contnet.utils.files import open_regular

__all__ = [
    "GT_FILES",
    "IMAGE_SUFFIX",
    "CityscapesSource",
    "Scene",
    "find_scenes",
    "sorted_scenes",
]

# Files of gtFine that Detectron2 reads in training or evaluation, by type of data set.
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
        labels: paths of the label files by the end of their name, such as "labelIds.png".
    """

    image: Path
    labels: dict[str, Path]


def find_scenes(image_dir: str, gt_dir: str, kind: str) -> list[Scene]:
    """Returns the images of a split, in order.

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
    """Sorts records of Cityscapes by file name.

    Detectron2 lists folders, whose order depends on the file system: without sorting, machines with
    copies of the data would not agree on which image is the tenth.
    """
    return sorted(records, key=lambda record: record["file_name"])


def _has_labels(file: Path) -> bool:
    """Whether a polygon file has an object that evaluation does not ignore."""
    try:
        with open_regular(file, "r", encoding="utf-8") as text:
            objects = json.load(text)["objects"]
        names = {str(thing["label"]).removesuffix("group") for thing in objects}
    except (LookupError, OSError, RecursionError, TypeError, ValueError):
        return True  # other checks report a damaged file
    return any(name not in name2label or not name2label[name].ignoreInEval for name in names)


def _image_record(image: Path) -> dict:
    with open_image(image) as stored:
        width, height = stored.size
    return {"file_name": str(image), "image_id": image.name, "height": height, "width": width}


@dataclass(frozen=True)
class CityscapesSource:
    """A data set of Detectron2's ``register_all_cityscapes``.

    Attributes:
        name: name of the data set.
        image_dir: ``leftImg8bit/SPLIT``.
        gt_dir: ``gtFine/SPLIT``.
        kind: a key of ``GT_FILES``.
    """

    name: str
    image_dir: str
    gt_dir: str
    kind: str

    @property
    def label(self) -> str:
        return f"{self.kind}_{Path(self.image_dir).name}"

    def digest(self) -> str:
        """Returns a digest of everything that the records depend on.

        This includes the polygons, the names of all files, the paths, and the versions of the
        libraries that create the records.

        Raises:
            OSError: if a file or folder cannot be read.
        """
        digest = hashlib.sha256()
        versions = detectron2.__version__, shapely.__version__, shapely.geos_version_string
        digest.update(json.dumps([astuple(self), versions]).encode())
        for root in filter(os.path.isdir, (self.image_dir, self.gt_dir)):
            for city in sorted(Path(root).iterdir()):
                names = sorted(os.listdir(city)) if city.is_dir() else None
                digest.update(json.dumps([city.name, names]).encode())
                for name in names or ():
                    if name.endswith("_polygons.json"):
                        with open_regular(city / name) as file:
                            digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def has_truth(self) -> bool:
        """Whether its objects are known; Cityscapes publishes none for the split "test"."""
        files = Path(self.gt_dir).glob("*/*_gtFine_polygons.json")
        return Path(self.gt_dir).name != "test" or any(map(_has_labels, sorted(files)))

    def read(self) -> list[dict]:
        """Returns its records, sorted by name; without ground truth, they have only images."""
        if not self.has_truth():
            return [_image_record(scene.image) for scene in self.scenes()]
        return sorted_scenes(DatasetCatalog.get(self.name))

    def scenes(self) -> list[Scene]:
        """See :func:`find_scenes`."""
        return find_scenes(self.image_dir, self.gt_dir, self.kind)

    def convert(self, content: list[dict]) -> tuple[list[dict], dict, list[str]]:
        """Returns what is cached; see :meth:`contnet.data.datasets.coco.CocoSource.convert`."""
        return content, {}, []
