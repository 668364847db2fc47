"""The losses of a model on a test set, without augmentation and without effect on training.

Detectron2's models return losses only in training mode. Here their backbones, norms and dropout
stay in evaluation mode, and the random state, running loss normalisers and the event storage do not
change. A model that samples candidates at random samples the same ones for an image each time.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from contnet.data.datasets.shards import sample_name
from contnet.data.pipeline.loader import to_device
from contnet.data.pipeline.mappers import ClassificationMapper, Mapper
from contnet.modeling.classifier import ImageClassifier
from contnet.modeling.thin_images import keep_a_pixel
from contnet.utils.seed import keeping_random_state, seed_everything

__all__ = ["build_loss_mapper", "mean_losses"]

# Modules that compute differently in training mode.
_TRAINING_ONLY = (_NormBase, _DropoutNd, DropPath)


def build_loss_mapper(cfg: CfgNode) -> Mapper | ClassificationMapper:
    """Builds the mapper of an evaluation, which also adds the targets of training."""
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        return ClassificationMapper(cfg, is_train=False)
    augmentations = keep_a_pixel(build_augmentation(cfg, is_train=False))
    return Mapper(cfg, is_train=True, augmentations=augmentations, recompute_boxes=False)


def _own_value(name: str, value: float, *_) -> float:
    """Replaces a dense detector's running mean of positives with the number in this image."""
    return value


@contextlib.contextmanager
def _giving_losses(model: nn.Module) -> Iterator[None]:
    """Context in which a model returns losses; restores the model afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for name, module in model.named_modules():
        if isinstance(module, _TRAINING_ONLY) or name == "backbone":
            module.eval()
    if isinstance(model, DenseDetector):
        model._ema_update = _own_value
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        if isinstance(model, DenseDetector):
            del model._ema_update


def _losses(model: nn.Module, batch: Sequence[dict]) -> dict[str, torch.Tensor]:
    if isinstance(model, ImageClassifier):  # training mode mixes and smooths labels
        model.eval()
        logits = torch.stack([each["logits"] for each in model(batch)])
        labels = torch.tensor([each["label"] for each in batch], device=logits.device)
        return {"loss_cls": F.cross_entropy(logits, labels)}
    return model(batch)


def mean_losses(
    cfg: CfgNode, model: nn.Module, batches: Iterable[Sequence[dict]]
) -> dict[str, float]:
    """Computes mean losses over all images, the same on all processes.

    Args:
        cfg: the config; MODEL.DEVICE is read.
        model: this process's model; it is not changed.
        batches: this process's inputs with targets, from :func:`build_loss_mapper`.

    Returns:
        Losses by name, with ``total_loss``; empty if there are no images.
    """
    sums, images = {}, 0
    with keeping_random_state(), torch.no_grad(), EventStorage():
        for batch in batches:
            seed_everything(zlib.crc32(sample_name(batch[0]).encode(errors="surrogateescape")))
            with _giving_losses(model):
                losses = _losses(model, to_device(batch, cfg.MODEL.DEVICE))
            images += len(batch)
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + len(batch) * loss.item()
    parts = comm.all_gather((sums, images))
    number = sum(images for _, images in parts)
    names = dict.fromkeys(name for sums, _ in parts for name in sums)
    means = {name: sum(sums.get(name, 0.0) for sums, _ in parts) / number for name in names}
    return {"total_loss": sum(means.values()), **means} if means else {}
