"""Compares an export with its PyTorch model and measures the speed of both."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn
from torchvision.ops import box_iou

from contnet.export.formats import Runner, Size
from contnet.export.modules import ExportModule
from contnet.modeling.classifier import ImageClassifier
from contnet.modeling.contnet import FEATURES, ConTNet
from contnet.modeling.pspnet import WindowSegmentor

__all__ = [
    "TOLERANCES",
    "Check",
    "Reference",
    "check_export",
    "compare",
    "measure_speed",
    "random_images",
]

# The largest accepted difference, by the type of the weights.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "int8": 1e-1}
# Minimum share of images with the same best class.
_LEAST_SAME_TOP1 = 0.95
# Maximum share of detections without a counterpart: rounding decides when two boxes overlap by
# almost exactly the NMS threshold.
_MOST_UNMATCHED = {"float32": 0.01, "float16": 0.05}
_SAME_IOU = 0.9
_BATCH = 3
_REPEATS = 5


# --- reference -----------------------------------------------------------------------------------


def _backbone_features(model: nn.Module, images: Tensor) -> list[Tensor]:
    x = [(image - model.pixel_mean) / model.pixel_std for image in images]
    batch = ImageList.from_tensors(x, model.backbone.size_divisibility)
    return list(model.backbone(batch.tensor).values())


def _network_features(model: nn.Module, images: Tensor) -> list[Tensor]:
    x = (images - model.pixel_mean) / model.pixel_std
    if isinstance(model.network, ConTNet):
        return list(model.network.forward_features(x, FEATURES).values())
    return [model.network.forward_features(x)]


def _fields(instances: Instances) -> list[Tensor]:
    found = [instances.pred_boxes.tensor, instances.scores, instances.pred_classes]
    return [*found, instances.pred_masks[:, 0]] if instances.has("pred_masks") else found


class Reference:
    """Computes the outputs of the trained model, in float32 and as lists of tensors.

    Args:
        model: the model in evaluation mode.
        backbone: whether to compute only its backbone.
    """

    def __init__(self, model: nn.Module, backbone: bool):
        self.model = copy.copy(model)
        if isinstance(model, WindowSegmentor):
            self.model.window = None  # an export processes the whole image
        self.backbone = backbone

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """Returns the outputs for images (N, 3, H, W) from 0 to 255; N is 1 for a detector."""
        model, inputs = self.model, [{"image": image} for image in images]
        if self.backbone and isinstance(model, ImageClassifier):
            return _network_features(model, images)
        if self.backbone:
            return _backbone_features(model, images)
        if isinstance(model, GeneralizedRCNN):
            # Without postprocessing, masks are not pasted into the image.
            (instances,) = model.inference(inputs, do_postprocess=False)
            return _fields(instances[instances.pred_boxes.nonempty()])
        outputs = model(inputs)
        if "instances" in outputs[0]:
            return _fields(outputs[0]["instances"])
        return [torch.stack([next(iter(output.values())) for output in outputs])]


# --- comparison ----------------------------------------------------------------------------------


@dataclass
class Check:
    """The result of a comparison.

    Attributes:
        tolerance: largest accepted difference.
        most_unmatched: maximum share of detections without a counterpart.
        difference: the largest difference: for logits and features relative to the largest value,
            for scores and masks absolute, for boxes relative to the longer side of the image.
        batches: number of batches that were compared.
        sizes: heights and widths of the images.
        detections: number of detections with a counterpart.
        unmatched: number without a counterpart, except those with about the lowest score.
        top1: for classifiers, whether the best class is the same, for each image.
    """

    tolerance: float
    most_unmatched: float = 0.0
    difference: float = 0.0
    batches: int = 0
    sizes: set[tuple[int, int]] = field(default_factory=set)
    detections: int = 0
    unmatched: int = 0
    top1: list[bool] = field(default_factory=list)

    @property
    def same_top1(self) -> float:
        """Share of images with the same best class."""
        return sum(self.top1) / len(self.top1) if self.top1 else 1.0

    @property
    def passed(self) -> bool:
        """Whether the differences are within the tolerances."""
        return (
            self.difference <= self.tolerance
            and self.unmatched <= self.most_unmatched * (self.detections + self.unmatched)
            and self.same_top1 >= _LEAST_SAME_TOP1
        )

    def describe(self) -> str:
        """Returns the result in one line."""
        text = f"largest difference {self.difference:.2g} (tolerance {self.tolerance:g})"
        if self.detections or self.unmatched:
            text += f", {self.detections} detections matched, {self.unmatched} not"
        if self.top1:
            text += f", same best class in {self.same_top1:.1%} of {len(self.top1)} images"
        return f"{text}, {self.batches} batches of {len(self.sizes)} sizes"


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _add(check: Check, difference: float) -> None:
    check.difference = max(check.difference, math.inf if math.isnan(difference) else difference)


def _compare_tensors(check: Check, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        check.difference = math.inf
    else:
        _add(check, _largest(found - expected) / max(_largest(expected), 1e-12))


def _compare_detections(
    check: Check, found: Sequence[Tensor], expected: Sequence[Tensor], longest: int
) -> None:
    """Pairs detections of a class by overlap, so that the order of equal scores does not matter."""
    boxes, scores, classes, *masks = found
    boxes_2, scores_2, classes_2, *masks_2 = expected
    # If there are more detections than the limit, any of those with the lowest score may be kept.
    lowest = max((float(each[-1]) for each in (scores, scores_2) if len(each)), default=0.0)
    clear = lowest + check.tolerance
    iou = box_iou(boxes, boxes_2) * (classes[:, None] == classes_2)
    iou = iou - (scores[:, None] - scores_2).abs()
    taken: set[int] = set()
    for i in range(len(boxes)):
        order = iou[i].argsort(descending=True).tolist()
        j = next((j for j in order if j not in taken), None)
        if j is None or iou[i, j] < _SAME_IOU:
            check.unmatched += bool(scores[i] > clear)
            continue
        taken.add(j)
        check.detections += 1
        _add(check, _largest(boxes[i] - boxes_2[j]) / longest)
        _add(check, _largest(scores[i] - scores_2[j]))
        for mask, mask_2 in zip(masks, masks_2, strict=True):
            _add(check, _largest(mask[i] - mask_2[j]))
    check.unmatched += sum(bool(scores_2[j] > clear) for j in range(len(boxes_2)) if j not in taken)


def compare(
    check: Check,
    names: Sequence[str],
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
    images: Tensor,
) -> None:
    """Adds the differences of a batch to a check.

    Args:
        check: the check.
        names: names of the outputs.
        found: the export's outputs.
        expected: the model's outputs.
        images: (N, 3, H, W); only their size is read.
    """
    height, width = images.shape[2:]
    check.batches += 1
    check.sizes.add((height, width))
    if "boxes" in names:
        _compare_detections(check, found, expected, max(height, width))
        return
    for one, other in zip(found, expected, strict=True):
        _compare_tensors(check, one, other)
    if list(names) == ["logits"] and found[0].shape == expected[0].shape:
        check.top1 += (found[0].argmax(1) == expected[0].argmax(1)).tolist()


def random_images(module: ExportModule, size: Size) -> list[Tensor]:
    """Returns batches of noise, of several sizes if the size is free."""
    least = module.least_side
    # A multiple of the patch size, a size that is not a multiple, the smallest and a wide size.
    sizes = [size] if size else [(224, 224), (203, 299), (least, least + 14), (150, 448)]
    counts = (1, _BATCH) if module.free_batch else (1,)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (count, 3, *each), generator=generator).float()
        for each in sizes
        for count in counts
    ]


def check_export(
    runner: Runner,
    reference: Reference,
    module: ExportModule,
    batches: Sequence[Tensor],
    precision: str,
) -> Check:
    """Compares an export with the model on batches of images.

    Args:
        runner: runs the written file.
        reference: the model.
        module: the exported module.
        batches: batches (N, 3, H, W) of images.
        precision: type of the weights, a key of ``TOLERANCES``.
    """
    check = Check(TOLERANCES[precision], _MOST_UNMATCHED.get(precision, 0.0))
    for images in batches:
        with torch.no_grad():
            found = runner(images)
        compare(check, module.output_names, found, reference(images), images)
    return check


def measure_speed(runner: Runner, reference: Reference, images: Tensor) -> tuple[float, float]:
    """Returns the median seconds per batch of the export and of the model, which run in turns."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for number in range(_REPEATS + 1):
        for which, function in enumerate((runner, reference)):
            start = time.perf_counter()
            with torch.no_grad():
                function(images)
            if number:  # the first one warms up
                times[which].append(time.perf_counter() - start)
    return median(times[0]), median(times[1])
