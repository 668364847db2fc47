"""Evaluates Cityscapes' instances with COCO's metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from iopath.common.file_io import file_lock

from contnet.utils.files import atomic_write

__all__ = ["NumberedImages", "as_coco"]


def _numbers(name: str) -> dict[str, int]:
    """Returns the number of each image id, which is its file name in Detectron2."""
    images = sorted(Path(MetadataCatalog.get(name).image_dir).glob("*/*.png"))
    return {path.name: number for number, path in enumerate(images, 1)}


def _digest(name: str) -> str:
    """Returns a digest of a data set's classes, image names and polygon files."""
    metadata = MetadataCatalog.get(name)
    content = hashlib.sha256(repr([metadata.thing_classes, _numbers(name)]).encode())
    for file in sorted(Path(metadata.gt_dir).glob("*/*_gtFine_polygons.json")):
        content.update(f"{file.name} {file.stat().st_size}".encode() + file.read_bytes())
    return content.hexdigest()[:16]


def as_coco(name: str, folder: str) -> str:
    """Prepares a Cityscapes data set of instances for Detectron2's ``COCOEvaluator``.

    Writes its objects in COCO format to ``annotations-DIGEST.json``, unless this file exists; files
    with another digest are removed. May be called by several processes.

    Args:
        name: name of a registered data set whose metadata has ``image_dir`` and ``gt_dir``.
        folder: folder for the file.

    Returns:
        The name to pass to the evaluator.
    """
    file = Path(folder, f"annotations-{_digest(name)}.json").absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(str(file)):
        if not file.exists():
            content, numbers = convert_to_coco_dict(name), _numbers(name)
            for image in content["images"]:
                image["id"] = numbers[image["id"]]
            for item in content.get("annotations", ()):
                item["image_id"] = numbers[item["image_id"]]
            with atomic_write(file, "w") as target:
                json.dump(content, target)
    if comm.is_main_process():
        for other in file.parent.glob("annotations-*"):
            if not other.name.startswith(file.name):
                other.unlink()
    # Separate metadata, because Detectron2 would set the file in the data set's permanently.
    things = MetadataCatalog.get(name).thing_classes
    MetadataCatalog.get(str(file)).set(json_file=str(file), thing_classes=things)
    return str(file)


class NumberedImages(DatasetEvaluator):
    """Passes images to an evaluator under the numbers of :func:`as_coco`.

    Cityscapes' image ids are strings, but COCO's tools expect numbers.

    Args:
        evaluator: evaluator of the data set that :func:`as_coco` returned.
        name: name of the Cityscapes data set.
    """

    def __init__(self, evaluator: DatasetEvaluator, name: str):
        self._evaluator = evaluator
        self._numbers = _numbers(name)

    def reset(self) -> None:
        self._evaluator.reset()

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        numbered = [{**image, "image_id": self._numbers[image["image_id"]]} for image in inputs]
        self._evaluator.process(numbered, outputs)

    @property
    def warnings(self) -> list[str]:
        return getattr(self._evaluator, "warnings", [])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Returns the evaluator's metrics."""
        return self._evaluator.evaluate()
