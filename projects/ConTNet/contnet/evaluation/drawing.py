"""Draws predictions or ground truth into images with Detectron2's Visualizer."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.utils.colormap import colormap

from contnet.utils.text import printable

__all__ = ["draw_prediction"]

# Images with a shorter longest side, in pixels, are enlarged so that labels are readable.
_SMALLEST = 480
_LONGEST_NAME = 40


def _shown(name: str) -> str:
    # Matplotlib would parse text between dollar signs as a formula.
    return printable(name, _LONGEST_NAME).replace("$", r"\$")


def _colours(number: int) -> list[np.ndarray]:
    """A colour for each class, RGB from 0 to 1."""
    every = colormap(rgb=True, maximum=1)
    return [every[index % len(every)] for index in range(number)]


def _enlarge(image: np.ndarray, prediction: dict) -> tuple[np.ndarray, dict]:
    """Enlarges a small image and its prediction by an integer factor."""
    times = -(-_SMALLEST // max(image.shape[:2]))
    if times <= 1:
        return image, prediction
    size = (times * image.shape[1], times * image.shape[0])
    larger = dict(prediction)
    if "boxes" in larger:
        larger["boxes"] = times * larger["boxes"]
    for key in ("masks", "semantic"):
        if key in larger:
            larger[key] = larger[key].repeat(times, -1).repeat(times, -2)
    return cv2.resize(image, size, interpolation=cv2.INTER_NEAREST), larger


def draw_prediction(image: np.ndarray, prediction: dict, class_names: Sequence[str]) -> np.ndarray:
    """Draws a prediction or the ground truth into an image.

    Args:
        image: uint8 RGB (H, W, 3).
        prediction: the result of :func:`contnet.evaluation.plain_outputs.plain_output`; ground
            truth has no scores.
        class_names: the model's class names.

    Returns:
        uint8 RGB image of the same size; a small image is enlarged.
    """
    from detectron2.utils.visualizer import Visualizer  # matplotlib writes into the user's home

    image, found = _enlarge(image, prediction)
    names, colours = list(map(_shown, class_names)), _colours(len(class_names))
    # Metadata as in the catalog, but not registered.
    metadata = Metadata(name="prediction", stuff_classes=names)
    metadata.stuff_colors = [(255 * colour).round().astype(int).tolist() for colour in colours]
    visualizer = Visualizer(image, metadata)
    if "semantic" in found:
        return visualizer.draw_sem_seg(found["semantic"], alpha=0.6).get_image()
    labels = [names[number] for number in found["classes"]]
    if "scores" in found:
        pairs = zip(labels, found["scores"], strict=True)
        labels = [f"{label} {100 * score:.0f}%" for label, score in pairs]
    if "boxes" in found:
        drawn = visualizer.overlay_instances(
            boxes=found["boxes"],
            masks=found.get("masks"),
            labels=labels,
            assigned_colors=[colours[number] for number in found["classes"]],
            alpha=0.4,
        )
    else:
        drawn = visualizer.draw_text("\n".join(labels), (4, 4), horizontal_alignment="left")
    return drawn.get_image()
