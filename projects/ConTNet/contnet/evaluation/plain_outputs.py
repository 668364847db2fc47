"""The outputs of a model for an image, as plain NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.structures import Instances
from torch import Tensor

__all__ = ["plain_output"]

_TOP = 5  # number of classes of a classification


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _named(classes: Tensor, class_names: Sequence[str]) -> dict:
    return {
        "classes": _array(classes),
        "names": [class_names[number] for number in classes.tolist()],
    }


def _detections(instances: Instances, class_names: Sequence[str], score: float) -> dict:
    order = instances.scores.argsort(descending=True, stable=True)
    instances = instances[order[instances.scores[order] >= score]]
    result = {
        "boxes": _array(instances.pred_boxes.tensor.float()),
        "scores": _array(instances.scores.float()),
        **_named(instances.pred_classes, class_names),
    }
    if instances.has("pred_masks"):
        result["masks"] = _array(instances.pred_masks.bool())
    return result


def plain_output(output: dict, class_names: Sequence[str], score: float = 0.0) -> dict:
    """Converts a model's output to arrays.

    Args:
        output: output of a model in evaluation mode: ``instances``, ``sem_seg`` or ``logits``.
        class_names: class names in the order of the model's outputs.
        score: minimum score of a detection.

    Returns:
        For detections, best first:

        - boxes: float32 (N, 4), left, top, right and bottom edge in pixels of the image;
        - scores: float32 (N,), from 0 to 1;
        - classes: int64 (N,);
        - names: a list of N class names;
        - masks: bool (N, H, W), if the model has them.

        For a segmentation ``semantic``: int64 (H, W), indices into ``class_names``. For a
        classification, scores (probabilities), classes and names of the best 5 classes.
    """
    if "instances" in output:
        return _detections(output["instances"], class_names, score)
    if "sem_seg" in output:
        return {"semantic": _array(output["sem_seg"].argmax(0))}
    best = output["logits"].softmax(0).topk(min(_TOP, len(class_names)))
    return {"scores": _array(best.values), **_named(best.indices, class_names)}
