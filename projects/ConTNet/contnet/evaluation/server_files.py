"""Results on data sets without public ground truth, in the formats of their evaluation servers.

Cityscapes' server accepts a zip of a folder with a text file that lists masks, or an image of class
ids, for each image. :mod:`contnet.evaluation.coco` writes COCO's format.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cityscapesscripts.helpers.labels import name2label
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from PIL import Image

from contnet.evaluation.cityscapes import read_class_ids

__all__ = ["CityscapesInstanceFiles", "CityscapesSemSegFiles"]


class _Files(DatasetEvaluator, ABC):
    """Writes the files of each process's own images, and replaces those of earlier evaluations.

    Args:
        name: name of a registered data set in Cityscapes' layout.
        folder: output folder for the data set.
    """

    def __init__(self, name: str, folder: str):
        self._folder = Path(folder, "server").absolute()
        self._things = MetadataCatalog.get(name).get("thing_classes")
        self.warnings = [
            f"{name} has no ground truth: no metrics; the files for Cityscapes' server are in "
            f"{self._folder}"
        ]

    def reset(self) -> None:
        if comm.is_main_process():
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        comm.synchronize()

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            self._write(Path(image["file_name"]), output)

    @abstractmethod
    def _write(self, image: Path, output: dict) -> None:
        """Writes the predictions of one image."""

    def evaluate(self) -> dict:
        """Returns no metrics."""
        comm.synchronize()
        return {}


class CityscapesInstanceFiles(_Files):
    """Writes ``NAME_pred.txt`` for each image: lines of mask file, class id and score."""

    def _write(self, image: Path, output: dict) -> None:
        instances = output["instances"].to("cpu")
        masks = self._folder / "masks"
        masks.mkdir(exist_ok=True)
        rows = zip(
            instances.pred_masks.numpy().astype(bool, copy=False),
            instances.scores.tolist(),
            instances.pred_classes.tolist(),
            strict=True,
        )
        lines = []
        for number, (mask, score, index) in enumerate(rows):
            file = masks / f"{image.stem}_{number}.png"
            Image.fromarray(mask.astype(np.uint8) * 255).save(file, compress_level=1)
            label = name2label[self._things[index]].id
            lines.append(f"{file.relative_to(self._folder)} {label} {score}\n")
        (self._folder / f"{image.stem}_pred.txt").write_text("".join(lines))


class CityscapesSemSegFiles(_Files):
    """Writes a PNG of class ids (not train ids) for each image, with the image's name."""

    def _write(self, image: Path, output: dict) -> None:
        Image.fromarray(read_class_ids(output)).save(self._folder / f"{image.stem}.png")
