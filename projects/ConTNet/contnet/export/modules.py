"""Trained models as exportable modules, which map a tensor of images to tensors.

They compute the same as the models of Detectron2 and of this project, including decoding and NMS,
without Python control flow that depends on the detections in an image.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from detectron2.modeling import GeneralizedRCNN, SemanticSegmentor
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from contnet.modeling.classifier import ImageClassifier
from contnet.modeling.contnet import FEATURES, ConTNet
from contnet.modeling.inference import cast_weights
from contnet.prediction.predictor import Predictor
from contnet.utils.errors import UserError

__all__ = ["ExportModule", "build_module"]


# --- parts ---------------------------------------------------------------------------------------


class _AveragePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as matrix products, for feature maps of any size."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def _weights(self, size: int, like: Tensor) -> Tensor:
        """Returns the share of each pixel in each bin, (side, size)."""
        bins = torch.arange(self.side, device=like.device)[:, None]
        first, end = bins * size // self.side, ((bins + 1) * size + self.side - 1) // self.side
        pixels = torch.arange(size, device=like.device)
        inside = (pixels >= first) & (pixels < end)
        return inside.to(like.dtype) / (end - first).to(like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        # Not x @ weights: torch.export would specialize a batch of one image.
        x = F.linear(x, self._weights(x.shape[3], x)).transpose(2, 3)
        return F.linear(x, self._weights(x.shape[3], x)).transpose(2, 3)


def _replace_pools(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.AdaptiveAvgPool2d) and isinstance(child.output_size, int):
            setattr(module, name, _AveragePool(child.output_size))
        else:
            _replace_pools(child)


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the ``count`` highest scores and their indices; missing scores are -inf."""
    # Do not compare with the number of scores: the result would become a constant of the export.
    return F.pad(scores, (0, count), value=-torch.inf).topk(count)


def _suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, limit: int | None
) -> Tensor:
    """Applies NMS within each group; returns at most ``limit`` indices of boxes, best first."""
    # Like torchvision's batched_nms for few boxes. The zero is for images without boxes.
    farthest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
    shifted = boxes + (groups.to(boxes.dtype) * (farthest + 1))[:, None]
    # Add two boxes beyond all others, which are always kept, because torch.export assumes that nms
    # returns at least two.
    farthest = torch.cat([shifted.flatten(), boxes.new_zeros(1)]).max()
    more = torch.tensor([[1, 1, 2, 2], [4, 4, 5, 5]]).to(boxes) + farthest
    lowest = torch.full((2,), -torch.inf).to(scores)
    kept = nms(torch.cat([shifted, more]), torch.cat([scores, lowest]), threshold)
    return kept[(kept < boxes.shape[0]).nonzero()[:, 0]][:limit]


def _clip(boxes: Tensor, height: int, width: int) -> Tensor:
    x = boxes[:, 0::2].clamp(min=0, max=width)
    y = boxes[:, 1::2].clamp(min=0, max=height)
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


def _nonempty(boxes: Tensor, least: float = 0.0) -> Tensor:
    """Returns the indices of the boxes whose sides are longer than ``least``."""
    return ((boxes[:, 2:] - boxes[:, :2]) > least).all(dim=1).nonzero()[:, 0]


def _pool(pooler: ROIPooler, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Returns the output (R, C, side, side) of a pooler for the boxes of one image."""
    regions = torch.cat([boxes.new_zeros(boxes.shape[0], 1), boxes], dim=1)
    sizes = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    levels = (pooler.canonical_level + (sizes / pooler.canonical_box_size + 1e-8).log2()).floor()
    levels = levels.clamp(pooler.min_level, pooler.max_level) - pooler.min_level
    places = [(levels == number).nonzero()[:, 0] for number in range(len(features))]
    pooled = [
        pool(feature, regions[place])
        for pool, feature, place in zip(pooler.level_poolers, features, places, strict=True)
    ]
    return torch.cat(pooled)[torch.cat(places).argsort()]


# --- modules -------------------------------------------------------------------------------------


class ExportModule(nn.Module):
    """A trained model that maps images (N, 3, H, W) to a tuple of tensors.

    Images are floats from 0 to 255, with channels in the order of the config; the module
    normalises them.

    Attributes:
        output_names: names of the outputs.
        free_batch: whether N may differ from 1.
        least_side: minimum length of the longer side of an image, in pixels.
        dtype: type in which the network, or the backbone of a detector, computes.
    """

    output_names: tuple[str, ...] = ()
    free_batch = True
    least_side = 33

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = model
        self.dtype = dtype
        cast_weights(self.network(), dtype)

    def network(self) -> nn.Module:
        """Returns the part that computes in ``dtype``."""
        return self.model.backbone

    def _normalize(self, images: Tensor, divisor: int = 1) -> Tensor:
        """Normalises images as the model does, and pads them to a multiple of ``divisor``."""
        images = (images - self.model.pixel_mean) / self.model.pixel_std
        if divisor > 1:
            h, w = images.shape[2], images.shape[3]
            rows, columns = (h + divisor - 1) // divisor, (w + divisor - 1) // divisor
            images = F.pad(images, (0, columns * divisor - w, 0, rows * divisor - h))
        return images.to(self.dtype)

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        images = self._normalize(images, self.model.backbone.size_divisibility)
        features = self.model.backbone(images)
        return {name: feature.float() for name, feature in features.items()}


class _Classifier(ExportModule):
    output_names = ("logits",)

    def network(self) -> nn.Module:
        return self.model.network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.model.network(self._normalize(images)).float(),)


class _ClassifierFeatures(_Classifier):
    """A classifier's network before its head."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__(model, dtype)
        stages = isinstance(model.network, ConTNet)
        self.output_names = FEATURES if stages else ("features",)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        images = self._normalize(images)
        if self.output_names == FEATURES:
            features = self.model.network.forward_features(images, FEATURES)
            return tuple(features[name].float() for name in FEATURES)
        return (self.model.network.forward_features(images).float(),)


class _Features(ExportModule):
    """The backbone of a detector or segmenter."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__(model, dtype)
        self.output_names = tuple(model.backbone.output_shape())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self._features(images)
        return tuple(features[name] for name in self.output_names)


class _Segmenter(ExportModule):
    """A segmenter, with logits (N, K, H, W) for the whole image at once."""

    output_names = ("semantic",)

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__(model, dtype)
        _replace_pools(model.sem_seg_head)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, _ = self.model.sem_seg_head(self._features(images))
        return (logits[..., : images.shape[2], : images.shape[3]],)


class _Detector(ExportModule):
    """A detector, with detections sorted by score.

    Outputs: boxes (D, 4) in pixels of the input image, scores (D,) and classes (D,).
    """

    output_names = ("boxes", "scores", "classes")
    free_batch = False

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__(model, dtype)
        # torch.export would specialize a feature map of one pixel.
        shapes = model.backbone.output_shape().values()
        self.least_side = max(shape.stride for shape in shapes) + 1


class _DenseDetector(_Detector):
    def _scores(self, predictions: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Returns the scores (H * W * A, K) of each level."""
        logits = [permute_to_N_HWA_K(x, self.model.num_classes)[0] for x in predictions[0]]
        if not isinstance(self.model, FCOS):
            return [x.sigmoid() for x in logits]
        centerness = [permute_to_N_HWA_K(x, 1)[0] for x in predictions[2]]
        pairs = zip(logits, centerness, strict=True)
        return [(x.sigmoid() * y.sigmoid()).sqrt() for x, y in pairs]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        model, features = self.model, self._features(images)
        features = [features[name] for name in model.head_in_features]
        predictions = model.head(features)
        deltas = [permute_to_N_HWA_K(x, 4)[0] for x in predictions[1]]
        found = []
        for level, scores in enumerate(self._scores(predictions)):
            best, places = _best(scores.flatten(), model.test_topk_candidates)
            kept = (best > model.test_score_thresh).nonzero()[:, 0]
            best, places = best[kept], places[kept]
            rows, classes = places // model.num_classes, places % model.num_classes
            anchors = model.anchor_generator(features)[level].tensor[rows]
            boxes = model.box2box_transform.apply_deltas(deltas[level][rows], anchors)
            found.append((boxes, best, classes))
        boxes, scores, classes = map(torch.cat, zip(*found, strict=True))
        limit = model.max_detections_per_image
        kept = _suppress(boxes, scores, classes, model.test_nms_thresh, limit)
        boxes = _clip(boxes[kept], images.shape[2], images.shape[3])
        inside = _nonempty(boxes)
        return boxes[inside], scores[kept][inside], classes[kept][inside]


class _RCNN(_Detector):
    """A two-stage detector, whose masks (D, side, side) are probabilities within each box."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__(model, dtype)
        if model.roi_heads.mask_on:
            self.output_names = (*_Detector.output_names, "masks")

    def _proposals(self, features: dict[str, Tensor], height: int, width: int) -> Tensor:
        rpn = self.model.proposal_generator
        features = [features[name] for name in rpn.in_features]
        anchors = rpn.anchor_generator(features)
        found = []
        for level, (logits, deltas) in enumerate(zip(*rpn.rpn_head(features), strict=True)):
            logits = logits.permute(0, 2, 3, 1).flatten()
            scores, places = _best(logits, rpn.pre_nms_topk[False])
            kept = scores.isfinite().nonzero()[:, 0]
            scores, places = scores[kept], places[kept]
            deltas = permute_to_N_HWA_K(deltas, 4)[0]
            boxes = rpn.box2box_transform.apply_deltas(
                deltas[places], anchors[level].tensor[places]
            )
            found.append((boxes, scores, torch.full_like(places, level)))
        boxes, scores, levels = map(torch.cat, zip(*found, strict=True))
        boxes = _clip(boxes, height, width)
        large = _nonempty(boxes, rpn.min_box_size)
        boxes, scores, levels = boxes[large], scores[large], levels[large]
        return boxes[_suppress(boxes, scores, levels, rpn.nms_thresh, rpn.post_nms_topk[False])]

    def _detections(
        self, features: dict[str, Tensor], proposals: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, predictor = self.model.roi_heads, self.model.roi_heads.box_predictor
        features = [features[name] for name in heads.box_in_features]
        logits, deltas = predictor(heads.box_head(_pool(heads.box_pooler, features, proposals)))
        scores = logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(dim=1)
        scores = scores[:, :-1]
        rows, classes = (scores > predictor.test_score_thresh).nonzero().unbind(1)
        scores = scores[rows, classes]
        if deltas.shape[1] > 4:  # one box for each class
            deltas = deltas.reshape(-1, heads.num_classes, 4)[rows, classes]
        else:
            deltas = deltas[rows]
        boxes = predictor.box2box_transform.apply_deltas(deltas, proposals[rows])
        boxes = _clip(boxes, height, width)
        limit = predictor.test_topk_per_image if predictor.test_topk_per_image >= 0 else None
        kept = _suppress(boxes, scores, classes, predictor.test_nms_thresh, limit)
        kept = kept[_nonempty(boxes[kept])]
        return boxes[kept], scores[kept], classes[kept]

    def _masks(self, features: dict[str, Tensor], boxes: Tensor, classes: Tensor) -> Tensor:
        heads = self.model.roi_heads
        features = [features[name] for name in heads.mask_in_features]
        logits = heads.mask_head.layers(_pool(heads.mask_pooler, features, boxes))
        if logits.shape[1] == 1:
            return logits[:, 0].sigmoid()
        return logits[torch.arange(boxes.shape[0], device=boxes.device), classes].sigmoid()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        height, width = images.shape[2], images.shape[3]
        features = self._features(images)
        proposals = self._proposals(features, height, width)
        boxes, scores, classes = self._detections(features, proposals, height, width)
        if "masks" not in self.output_names:
            return boxes, scores, classes
        return boxes, scores, classes, self._masks(features, boxes, classes)


# --- builders ------------------------------------------------------------------------------------


def _is_plain_rcnn(model: nn.Module) -> bool:
    heads = getattr(model, "roi_heads", None)
    return (
        isinstance(model, GeneralizedRCNN)
        and type(model.proposal_generator) is RPN
        and type(heads) is StandardROIHeads
        and type(heads.box_predictor) is FastRCNNOutputLayers
        and not heads.keypoint_on
        and (not heads.mask_on or isinstance(heads.mask_head, MaskRCNNConvUpsampleHead))
    )


def _choose(model: nn.Module, backbone: bool) -> type[ExportModule]:
    if isinstance(model, ImageClassifier):
        return _ClassifierFeatures if backbone else _Classifier
    if backbone:
        return _Features
    if isinstance(model, SemanticSegmentor):
        return _Segmenter
    if isinstance(model, (RetinaNet, FCOS)):
        return _DenseDetector
    if _is_plain_rcnn(model):
        return _RCNN
    raise UserError(
        f"{type(model).__name__} with these heads cannot be exported as a whole: --backbone "
        "exports its backbone"
    )


def build_module(
    predictor: Predictor, *, backbone: bool = False, dtype: torch.dtype = torch.float32
) -> ExportModule:
    """Returns the model of a predictor as a module that can be exported, on the CPU.

    Args:
        predictor: the predictor; its model is copied.
        backbone: use only the backbone.
        dtype: type of the weights and the computation of the network, or of a detector's or
            segmenter's backbone. Everything after a backbone stays in float32.

    Raises:
        UserError: if the model's heads are not supported.
    """
    model = copy.deepcopy(predictor.model).cpu().eval().requires_grad_(False)
    constraints = getattr(getattr(model, "backbone", None), "padding_constraints", {})
    if constraints.get("square_size"):
        raise UserError("its backbone pads images to squares, which cannot be exported")
    return _choose(model, backbone)(model, dtype).eval()
