"""What the records of a data set are made from: its annotation files, and a digest of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import detectron2
import shapely
from detectron2.data import DatasetCatalog, MetadataCatalog

from contnet.data.datasets.cityscapes import sorted_scenes
from contnet.data.datasets.coco import class_names, make_records, read_instances
from contnet.utils.errors import UserError

__all__ = ["AnnotationSource", "CityscapesSource", "CocoSource", "find_source", "image_names"]

_PIECE = 1 << 20


def _digest_of(paths: Iterable[str | Path]) -> str:
    """Of the content of files, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
                while piece := file.read(_PIECE):
                    digest.update(piece)
        except OSError as error:
            raise UserError(
                f"the annotation file {path} cannot be read ({error.strerror})"
            ) from error
    return digest.hexdigest()


def image_names(content: dict) -> list[str]:
    """Names of the images of a COCO annotation file, as the file has them."""
    return [str(image.get("file_name")) for image in content["images"]]


@dataclass(frozen=True)
class CocoSource:
    """A data set of Detectron2's ``register_coco_instances``."""

    json_file: str
    image_root: str

    @property
    def label(self) -> str:
        return Path(self.json_file).stem

    def digest(self) -> str:
        return _digest_of([self.json_file])

    def versions(self) -> list[str]:
        """Of the libraries that the records depend on."""
        return []

    def read(self) -> tuple[Iterable[dict], dict, list[str]]:
        return self.convert(read_instances(self.json_file))

    def convert(self, content: dict) -> tuple[Iterable[dict], dict, list[str]]:
        """Records of a file's content, what else a start wants to know, names of the images."""
        facts = {
            "classes": class_names(content),
            "ids": sorted(category["id"] for category in content["categories"]),
            "objects": len(content["annotations"]),
        }
        return make_records(content, self.image_root), facts, image_names(content)


@dataclass(frozen=True)
class CityscapesSource:
    """A data set of Detectron2's ``register_all_cityscapes``."""

    name: str
    image_dir: str
    gt_dir: str
    kind: str

    @property
    def label(self) -> str:
        return f"{self.kind}_{Path(self.image_dir).name}"

    def digest(self) -> str:
        """Of the polygons, and of the names of all files."""
        files = {}
        for root in (self.image_dir, self.gt_dir):
            for city in sorted(os.listdir(root)):
                folder = os.path.join(root, city)
                files[folder] = sorted(os.listdir(folder)) if os.path.isdir(folder) else None
        polygons = [
            os.path.join(folder, name)
            for folder, names in files.items()
            for name in names or ()
            if name.endswith("_polygons.json")
        ]
        return hashlib.sha256(json.dumps([files, _digest_of(polygons)]).encode()).hexdigest()

    def versions(self) -> list[str]:
        return [detectron2.__version__, shapely.__version__, shapely.geos_version_string]

    def read(self) -> tuple[Iterable[dict], dict, list[str]]:
        return sorted_scenes(DatasetCatalog.get(self.name)), {}, []


AnnotationSource = CocoSource | CityscapesSource


def find_source(name: str) -> AnnotationSource | None:
    """What a name stands for; None unless a loader of Detectron2's that we know is behind it."""
    if name not in DatasetCatalog:
        return None
    loader, metadata = DatasetCatalog[name], MetadataCatalog.get(name)
    maker = (loader.__module__, getattr(loader, "__qualname__", "").partition(".")[0])
    if maker == ("detectron2.data.datasets.coco", "register_coco_instances"):
        return CocoSource(metadata.json_file, metadata.image_root)
    if maker == ("detectron2.data.datasets.builtin", "register_all_cityscapes"):
        return CityscapesSource(name, metadata.image_dir, metadata.gt_dir, metadata.evaluator_type)
    return None
