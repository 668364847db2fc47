"""Trained models as functions, from images to plain NumPy arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image

from contnet.checkpoint.loading import load_weights
from contnet.checkpoint.metadata import describe_model
from contnet.checkpoint.names import BEST, FINAL, find_checkpoint, published_file
from contnet.checkpoint.reading import Weights, read_weights
from contnet.config.nodes import get_value
from contnet.data.datasets.classes import CLASS_KEYS, IMAGE_LABELS, dataset_class_names
from contnet.data.pipeline.mappers import ClassificationMapper, Mapper
from contnet.evaluation.plain_outputs import plain_output
from contnet.launch.preflight_config import load_checked_config, parse_checked_config
from contnet.modeling.amp import autocast
from contnet.modeling.build import build_model
from contnet.modeling.compat import silence_known_warnings
from contnet.utils.errors import UsageError, UserError

__all__ = ["Predictor", "build_predictor", "config_of", "find_weights", "load_run"]

_CONFIG_FILE = "config.yaml"
# Tasks by the kind of data that the classes describe.
_TASKS = {
    "objects": "detection",
    "label maps": "segmentation",
    IMAGE_LABELS: "classification",
}

# An image as a path, a Pillow image, or a uint8 array (H, W) or (H, W, 3) in RGB order.
ImageLike = str | Path | Image.Image | np.ndarray


# --- images --------------------------------------------------------------------------------------


def _record_of(number: int, image: ImageLike) -> dict:
    """Returns the record of an image for a mapper."""
    if isinstance(image, (str, os.PathLike)):
        return {"file_name": os.fspath(image)}
    name = f"image {number}"
    if isinstance(image, Image.Image):
        return {"file_name": name, "pixels": image.copy()}
    if not isinstance(image, np.ndarray):
        raise UserError(
            f"{name} is a {type(image).__name__}: give a path, a Pillow image or an array"
        )
    if image.dtype != np.uint8 or not (image.ndim == 2 or image.shape[2:] == (3,)):
        raise UserError(
            f"{name} is an array of {image.dtype} {image.shape}: give uint8 (H, W), or (H, W, 3) "
            "in RGB order"
        )
    return {"file_name": name, "pixels": Image.fromarray(image)}


# --- predictor -----------------------------------------------------------------------------------


class Predictor:
    """A trained model that accepts images of any size and returns plain arrays.

    It keeps no state between calls, so threads may share it.

    Args:
        cfg: config of the model; MODEL.WEIGHTS is the file of its weights.
        model: from :func:`contnet.modeling.build.build_model`, in evaluation mode.
        class_names: class names in the order of the model's outputs.

    Attributes:
        task: "detection", "segmentation" (a class for each pixel) or "classification".
        source: the file of weights.
    """

    def __init__(
        self, cfg: CfgNode, model: torch.nn.Module, class_names: Sequence[str], source: str = ""
    ):
        self.cfg = cfg
        self.model = model
        self.class_names = list(class_names)
        self.source = source
        kinds = CLASS_KEYS[cfg.MODEL.META_ARCHITECTURE]
        self.task = _TASKS[next(iter(kinds))]
        classifies = self.task == "classification"
        self.mapper = (ClassificationMapper if classifies else Mapper)(cfg, is_train=False)

    def __call__(
        self, images: ImageLike | Sequence[ImageLike], *, score: float = 0.0, batch_size: int = 1
    ) -> dict | list[dict]:
        """Runs the model on one image or a list of images.

        Args:
            images: one image or a list: paths, Pillow images, or uint8 arrays, (H, W) or (H, W, 3)
                in RGB order. As in training, their EXIF orientation is applied, and they are
                converted to 8 bits and three channels.
            score: minimum score of a detection. Detections below the threshold in the model's
                config are never returned.
            batch_size: number of images per forward pass. Detectors pad the images of a batch to
                the same size, which changes results slightly; an evaluation uses batches of one.

        Returns:
            A dict for each image. Detectors, best detection first: boxes, float32 (N, 4) as left,
            top, right and bottom edge in pixels of the image; scores, float32 (N,); classes, int64
            (N,); names, a list; and masks, bool (N, H, W), if the model has masks. Segmenters:
            ``semantic``, int64 (H, W). Classifiers, for the top 5 classes: scores (probabilities),
            classes and names.

        Raises:
            UserError: for an image that cannot be read.
        """
        single = not isinstance(images, (list, tuple))
        found = []
        records = [_record_of(*each) for each in enumerate([images] if single else images)]
        for start in range(0, len(records), batch_size):
            inputs = [self.mapper(record) for record in records[start : start + batch_size]]
            found += self.infer(inputs, score)
        return found[0] if single else found

    def infer(self, inputs: Sequence[dict], score: float = 0.0) -> list[dict]:
        """Runs the model on the mapper's outputs; returns the same as a call."""
        with torch.inference_mode(), autocast(self.cfg):
            outputs = self.model(inputs)
            return [plain_output(output, self.class_names, score) for output in outputs]


# --- loading -------------------------------------------------------------------------------------


def find_weights(folder: Path) -> Path:
    """Finds the file of a run's best weights."""
    for name in (BEST, FINAL):
        if (path := folder / f"{name}.pth").is_file():
            return path
    if path := find_checkpoint(folder) or published_file(folder):
        return path
    raise UserError(f"{folder} has no checkpoint: give the folder of a run, or a file")


def config_of(weights: Weights) -> CfgNode:
    """Returns the config of the run that wrote a file."""
    if weights.metadata and weights.metadata.config:
        return parse_checked_config(weights.metadata.config, f"the config in {weights.path}")
    beside = Path(weights.path).parent / _CONFIG_FILE
    if beside.is_file():
        return load_checked_config(str(beside))
    raise UsageError(f"{weights.path} does not contain its config: add --config-file")


def _choose_device(cfg: CfgNode, device: str) -> str:
    name = device or cfg.MODEL.DEVICE
    if torch.device(name).type == "cuda" and not torch.cuda.is_available():
        if device:
            raise UserError(f"device is {device}, but PyTorch finds no GPU")
        return "cpu"
    return name


def build_predictor(cfg: CfgNode, weights: Weights, device: str = "") -> Predictor:
    """Builds the model of a config, with the weights of a file.

    Args:
        cfg: config of the file, or one that fits it; not frozen.
        weights: weights from :func:`contnet.checkpoint.reading.read_weights`.
        device: as in :func:`load_run`.

    Raises:
        UserError: if the weights do not fit, or the model's task is not supported.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE
    if len(CLASS_KEYS.get(architecture, ())) != 1:
        raise UserError(
            f"{weights.path} has the architecture {architecture}, which is not supported"
        )
    (key,) = CLASS_KEYS[architecture].values()
    cfg.MODEL.DEVICE = _choose_device(cfg, device)
    if weights.classes:  # a shipped config has the number of classes of its own data set
        cfg.merge_from_list([key, len(weights.classes)])
    cfg.freeze()
    names = weights.classes or dataset_class_names(cfg, cfg.DATASETS.TEST)
    names = list(names or map(str, range(get_value(cfg, key))))
    model = build_model(cfg).eval()
    load_weights(model, weights, whole=True, ours=describe_model(cfg, names))
    return Predictor(cfg, model, names, weights.path)


def load_run(
    source: str | Path,
    config_file: str | Path = "",
    opts: Sequence[str] = (),
    *,
    device: str = "",
) -> Predictor:
    """Loads a trained model.

    Args:
        source: the folder of a run, whose best weights are used (those of the last iteration if
            there was no evaluation), or of a published model, or a file of weights.
        config_file: config of the model, if the file does not contain its own.
        opts: config keys and values, ``[KEY, VALUE, ...]``, for ``config_file``.
        device: "cpu", "cuda" or "cuda:N"; by default the config's, or the CPU if there is no GPU.

    Raises:
        UserError: if there are no weights, they are damaged or do not fit the config, or the config
            is unknown.
    """
    silence_known_warnings()
    path = Path(source)
    path = find_weights(path) if path.is_dir() else path
    weights = read_weights(str(path), prefer_ema=True)
    cfg = load_checked_config(str(config_file), opts) if config_file else config_of(weights)
    return build_predictor(cfg, weights, device)
