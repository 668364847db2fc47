"""Cityscapes' own metrics of instance and semantic segmentation.

Each process compares its own images with the ground truth. The results are small, and are gathered
on the main process, which computes the scores with the functions of cityscapesscripts. Processes
share no files, and nothing is written to the working directory.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as official_instances
import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as official_classes
import numpy as np
import torch
from cityscapesscripts.evaluation.instances2dict import instances2dict
from cityscapesscripts.helpers.labels import category2labels, id2label, labels, name2label
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from PIL import Image
from tabulate import tabulate

from contnet.data.pipeline.images import decode_error, read_stored
from contnet.modeling.compat import restore_in1d
from contnet.utils.errors import UserError
from contnet.utils.files import atomic_write, writing

__all__ = [
    "CITYSCAPES_COLOURS",
    "CONFUSION_FILE",
    "CityscapesInstanceEvaluator",
    "CityscapesSemSegEvaluator",
    "label_indices",
    "match_instances",
    "read_class_ids",
]

logger = logging.getLogger(__name__)

CONFUSION_FILE = "confusion.npz"
_IMAGE_END = "_leftImg8bit"
_VOID = [label.id for label in labels if label.ignoreInEval]
_EVALUATED = [label for label in labels if not label.ignoreInEval]
# Class id of each trained class.
_IDS = np.array(
    [label.id for label in sorted(_EVALUATED, key=lambda label: label.trainId)], dtype=np.uint8
)
# RGB colour of each trained class.
CITYSCAPES_COLOURS = np.array([id2label[number].color for number in _IDS.tolist()], dtype=np.uint8)


class _Evaluator(DatasetEvaluator, ABC):
    """Keeps the results of :meth:`_compare` for each image, and gathers them.

    Args:
        name: name of a registered data set whose metadata has ``gt_dir``.
        truth: kind of its ground truth files, e.g. "labelIds".
    """

    def __init__(self, name: str, truth: str):
        self._name = name
        self._metadata = MetadataCatalog.get(name)
        self._folder = Path(self._metadata.gt_dir)
        self._end = f"_gtFine_{truth}.png"
        self._images: dict[str, Any] = {}
        self.warnings: list[str] = []

    def reset(self) -> None:
        self._images, self.warnings = {}, []

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            self._keep(image, partial(self._read_output, output))

    def skip(self, images: Sequence[dict]) -> None:
        """Counts images that cannot be read as images without predictions."""
        for image in images:
            self._keep(image, self._nothing)

    def _keep(self, image: dict, predict: Callable[[Path], Any]) -> None:
        path = Path(image["file_name"])
        name = f"{path.parent.name}/{path.stem.removesuffix(_IMAGE_END)}{self._end}"
        file = self._folder / name
        try:
            self._images[name] = self._compare(file, predict(file))
        except KeyError as error:  # from cityscapesscripts' table of ids
            raise UserError(
                f"{file}, or the files next to it: {error} is not a class id of "
                "Cityscapes; remove them and run python tools/prepare_cityscapes.py"
            ) from error

    @abstractmethod
    def _read_output(self, output: dict, file: Path) -> Any:
        """Returns the prediction in a model's output."""

    @abstractmethod
    def _nothing(self, file: Path) -> Any:
        """Returns an empty prediction; ``file`` is the ground truth."""

    @abstractmethod
    def _compare(self, file: Path, prediction: Any) -> Any:
        """Compares an image with its ground truth ``file``; returns what the scores need."""

    def _gather(self) -> dict[str, Any]:
        """Gathers all results by image name, in the order of names, on the main process only."""
        images = {name: value for part in comm.gather(self._images) for name, value in part.items()}
        if comm.is_main_process():
            present = len(list(self._folder.glob(f"*/*{self._end}")))
            if len(images) != present:
                self.warnings = [
                    f"{self._name}: the metrics are those of {len(images)} images, but "
                    f"{self._folder} has ground truth for {present}"
                ]
                logger.warning(self.warnings[0])
        return dict(sorted(images.items()))


def _read_pixels(file: Path) -> np.ndarray:
    """The pixels of a ground truth file."""
    try:
        return read_stored(str(file))
    except UserError as error:
        raise UserError(
            f"{file} cannot be read ({decode_error(error.__cause__)}): remove it if it is there, "
            "and run python tools/prepare_cityscapes.py"
        ) from error


def _read(file: Path, shape: Sequence[int]) -> np.ndarray:
    """The pixels of a ground truth file, with the shape (H, W) of the predictions."""
    pixels = _read_pixels(file)
    if pixels.shape != tuple(shape):
        raise UserError(
            f"{file} has the shape {pixels.shape}, predictions for it have {tuple(shape)}: the "
            "image, its polygons and its label files must have the same size"
        )
    return pixels


def _log_table(name: str, scores: dict[str, float], columns: Sequence[str]) -> None:
    """Logs scores named "COLUMN-CLASS", and averages named "COLUMN", as a table."""
    first = f"{columns[0]}-"
    classes = [key.removeprefix(first) for key in scores if key.startswith(first)]
    rows = [[row, *(scores.get(f"{column}-{row}") for column in columns)] for row in classes]
    rows.append(["average", *(scores[column] for column in columns)])
    table = tabulate(rows, ["class", *columns], tablefmt="pipe", floatfmt=".2f")
    logger.info(f"Cityscapes' metrics of {name}:\n{table}")


# --- instances -----------------------------------------------------------------------------------


def match_instances(
    truth: dict[str, list[dict]],
    pixels: np.ndarray,
    instances: Instances,
    things: Sequence[str],
) -> dict[str, dict[str, list[dict]]]:
    """Computes the overlaps of an image's predictions with the objects of their class.

    Args:
        truth: objects by label, from cityscapesscripts' ``instances2dict``.
        pixels: instanceIds of the ground truth, (H, W).
        instances: on the CPU, with ``pred_masks`` (N, H, W), ``scores`` and ``pred_classes``.
        things: the labels that ``pred_classes`` index.

    Returns:
        "groundTruth" and "prediction", each by label, as cityscapesscripts' ``assignGt2Preds``
        makes them from files.
    """
    objects = {name: [{**item, "matchedPred": []} for item in truth[name]] for name in things}
    predictions: dict[str, list[dict]] = {name: [] for name in things}
    rows = zip(
        instances.pred_masks.numpy().astype(bool, copy=False),
        instances.scores.tolist(),
        instances.pred_classes.tolist(),
        strict=True,
    )
    for mask, score, index in rows:
        values, counts = np.unique(pixels[mask], return_counts=True)
        if not len(values):
            continue
        overlaps = dict(zip(values.tolist(), counts.tolist(), strict=True))
        name = things[index]
        prediction = {
            "predID": sum(map(len, predictions.values())),
            "labelID": name2label[name].id,
            "pixelCount": int(counts.sum()),
            "confidence": score,
            "voidIntersection": sum(overlaps.get(void, 0) for void in _VOID),
        }
        matched = []
        for item, original in zip(objects[name], truth[name], strict=True):
            if overlap := overlaps.get(item["instID"]):
                item["matchedPred"].append({**prediction, "intersection": overlap})
                matched.append({**original, "intersection": overlap})
        predictions[name].append({**prediction, "matchedGt": matched})
    return {"groundTruth": objects, "prediction": predictions}


class CityscapesInstanceEvaluator(_Evaluator):
    """Cityscapes' AP and AP50 of instance masks.

    A class counts in the average if the ground truth has an object of it; otherwise its AP is nan.
    The task of the result is "cityscapes", since "segm" is COCO's.

    Args:
        name: name of a registered data set whose metadata has ``gt_dir`` and ``thing_classes``.
    """

    def __init__(self, name: str):
        super().__init__(name, "instanceIds")
        self._args = copy.copy(official_instances.args)
        self._args.instLabels = list(self._metadata.thing_classes)

    def _read_output(self, output: dict, file: Path) -> Instances:
        return output["instances"].to("cpu")

    def _nothing(self, file: Path) -> Instances:
        shape = _read_pixels(file).shape
        masks = torch.zeros(0, *shape, dtype=torch.bool)
        numbers = torch.zeros(0, dtype=torch.int64)
        return Instances(shape, pred_masks=masks, scores=numbers.double(), pred_classes=numbers)

    def _compare(self, file: Path, instances: Instances) -> dict:
        pixels = _read(file, instances.pred_masks.shape[1:])
        (truth,) = instances2dict([str(file)]).values()
        return match_instances(truth, pixels, instances, self._args.instLabels)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Returns {"cityscapes": {"AP", "AP50", "AP-person", "AP50-person", ...}} in percent."""
        images = self._gather()
        if not comm.is_main_process():
            return {}
        matches = dict(enumerate(images.values()))
        precisions = official_instances.evaluateMatches(matches, self._args)
        with warnings.catch_warnings():  # if no class has an object
            warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
            averages = official_instances.computeAverages(precisions, self._args)
        scores = {"AP": averages["allAp"], "AP50": averages["allAp50%"]}
        for name, values in averages["classes"].items():
            scores[f"AP-{name}"] = values["ap"]
            scores[f"AP50-{name}"] = values["ap50%"]
        scores = {key: 100 * float(score) for key, score in scores.items()}
        _log_table(self._name, scores, ("AP", "AP50"))
        return {"cityscapes": scores}


# --- classes -------------------------------------------------------------------------------------


def label_indices(ids: np.ndarray) -> np.ndarray:
    """Maps class ids to train ids, uint8; 255 for ids that are not trained."""
    indices = np.full(256, 255, dtype=np.uint8)
    indices[_IDS] = np.arange(len(_IDS))
    return indices[ids]


def read_class_ids(output: dict) -> np.ndarray:
    """Returns Cityscapes' class ids, uint8 (H, W), of a model's output.

    Raises:
        UserError: if the model has another number of classes.
    """
    scores = output["sem_seg"]
    if len(scores) != len(_IDS):
        raise UserError(
            f"the model predicts {len(scores)} classes, Cityscapes has {len(_IDS)}: set "
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES to {len(_IDS)}"
        )
    return _IDS[scores.argmax(dim=0).byte().cpu().numpy()]  # bytes, to copy less from a GPU


class _Terms(list):
    """A sum that keeps its terms, so they can be added in a fixed order.

    Sums of floats depend on the order, so the last digits would depend on the number of processes.
    """

    def __iadd__(self, term: float) -> _Terms:
        self.append(term)
        return self


def _sums(stats: dict) -> list[tuple[dict, str]]:
    """Returns (dict, key) of each sum of weighted pixels in cityscapesscripts' statistics."""
    groups = [group for kind in stats.values() for group in kind.values()]
    return [(group, key) for group in groups for key in ("tpWeighted", "fnWeighted")]


class CityscapesSemSegEvaluator(_Evaluator):
    """Cityscapes' IoU and iIoU of classes and of categories.

    As in the official script, a class counts in the average if it has pixels in the ground truth,
    or was predicted where the ground truth has a class; otherwise its IoU is nan.

    Args:
        name: name of a registered data set whose metadata has ``gt_dir``.
        folder: folder for a file with each image's confusion matrix; "" for none.
    """

    def __init__(self, name: str, folder: str = ""):
        super().__init__(name, "labelIds")
        self._output = folder
        restore_in1d(official_classes)
        self._args = copy.copy(official_classes.args)
        official_classes.generateMatrix(self._args)  # It also sets evalLabels.

    def _read_output(self, output: dict, file: Path) -> np.ndarray:
        return read_class_ids(output)

    def _nothing(self, file: Path) -> np.ndarray:
        return np.zeros_like(_read_pixels(file), dtype=np.uint8)  # "unlabeled"

    def _compare(self, file: Path, prediction: np.ndarray) -> tuple[np.ndarray, list[_Terms]]:
        for value in np.unique(_read(file, prediction.shape)).tolist():
            id2label[value]  # raises KeyError for other ids
        _read(file.with_name(file.name.replace("labelIds", "instanceIds")), prediction.shape)
        matrix = official_classes.generateMatrix(self._args)
        stats = official_classes.generateInstanceStats(self._args)
        for group, key in _sums(stats):
            group[key] = _Terms()
        with tempfile.TemporaryDirectory(prefix="cityscapes_") as folder:
            predicted = Path(folder, "prediction.png")
            Image.fromarray(prediction).save(predicted, compress_level=1)
            official_classes.evaluatePair(str(predicted), str(file), matrix, stats, {}, self._args)
        return matrix, [group[key] for group, key in _sums(stats)]

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Returns {"sem_seg": {"IoU", "iIoU", "IoU_sup", "iIoU_sup", "IoU-road", ...}} in percent.

        "_sup" marks categories. The instance score iIoU exists for classes with instances, and
        for categories with only such classes.
        """
        images = self._gather()
        if not comm.is_main_process():
            return {}
        matrix = official_classes.generateMatrix(self._args)
        stats = official_classes.generateInstanceStats(self._args)
        if self._output and images:
            self._write({name: image for name, (image, _) in images.items()})
        for image, sums in images.values():
            matrix += image
            for (group, key), terms in zip(_sums(stats), sums, strict=True):
                for term in terms:
                    group[key] += term
        scores = self._scores(matrix, stats)
        scores = {key: 100 * float(score) for key, score in scores.items()}
        _log_table(self._name, scores, ("IoU", "iIoU"))
        _log_table(f"{self._name}, categories", scores, ("IoU_sup", "iIoU_sup"))
        return {"sem_seg": scores}

    def _write(self, matrices: dict[str, np.ndarray]) -> None:
        """Writes pixel counts (C, C + 1) of images by true and predicted class, or none (last)."""
        path = Path(self._output, CONFUSION_FILE)
        counts = np.stack([each[_IDS] for each in matrices.values()]).astype(np.int64)
        none = np.delete(counts, _IDS, axis=2).sum(axis=2, keepdims=True)
        names = [id2label[number].name for number in _IDS.tolist()]
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez_compressed(
                file,
                truth=np.array(list(matrices)),
                class_names=np.array(names),
                counts=np.concatenate([counts[:, :, _IDS], none], axis=2),
            )

    def _scores(self, matrix: np.ndarray, stats: dict) -> dict[str, float]:
        args, things = self._args, stats["classes"]
        ids = {label.name: label.id for label in _EVALUATED}
        categories = {label.category for label in _EVALUATED}
        categories = [name for name in category2labels if name in categories]
        parts = {
            "IoU": {
                n: official_classes.getIouScoreForLabel(i, matrix, args) for n, i in ids.items()
            },
            "iIoU": {
                name: official_classes.getInstanceIouScoreForLabel(ids[name], matrix, stats, args)
                for name in things
            },
            "IoU_sup": {
                name: official_classes.getIouScoreForCategory(name, matrix, args)
                for name in categories
            },
            "iIoU_sup": {
                name: official_classes.getInstanceIouScoreForCategory(name, matrix, stats, args)
                for name in stats["categories"]
            },
        }
        averages = {
            kind: official_classes.getScoreAverage(part, args) for kind, part in parts.items()
        }
        each = {f"{kind}-{name}": v for kind, part in parts.items() for name, v in part.items()}
        return averages | each
