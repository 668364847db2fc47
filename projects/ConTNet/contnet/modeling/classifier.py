"""Image classification as a Detectron2 meta-architecture, with any network that timm can build."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from contnet.modeling.contnet import VARIANTS
from contnet.modeling.image_batch import ImageBatch
from contnet.utils.errors import UsageError

__all__ = [
    "OPTION_KEYS",
    "ImageClassifier",
    "build_batch_augmentation",
    "build_classification_network",
    "classifier_name",
    "contnet_options",
]

# Keys of MODEL.CONTNET that are arguments of ConTNet, with the same names in lower case.
_ARGUMENT_KEYS = (
    "RELATIVE",
    "PRE_NORM",
    "USE_AVGDOWN",
    "QKV_BIAS",
    "DROP_RATE",
    "LAST_DROP_RATE",
    "DROP_PATH_RATE",
)
# Keys of MODEL.CONTNET that affect classifiers; its other keys only affect backbones.
OPTION_KEYS = (*_ARGUMENT_KEYS, "GRAD_CHECKPOINTING", "SDPA")


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """A classification network with input normalisation, mixup, CutMix and loss.

    Args:
        network: maps normalised images (N, 3, H, W) to logits (N, classes).
        pixel_mean: mean of each channel, for values from 0 to 255.
        pixel_std: standard deviation of each channel, for values from 0 to 255.
        label_smoothing: share of the target that is spread evenly over all classes.
        mix: mixes images and labels of a batch, and smooths the labels; or None.
        erase: erases parts of normalised images; or None.
        channels_last: use the channels-last memory format for images and weights.
    """

    @configurable
    def __init__(
        self,
        network: nn.Module,
        *,
        pixel_mean: list[float],
        pixel_std: list[float],
        label_smoothing: float = 0.0,
        mix: Mixup | None = None,
        erase: RandomErasing | None = None,
        channels_last: bool = False,
    ):
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(memory_format=self.memory_format)
        self.label_smoothing = label_smoothing
        self.mix = mix
        self.erase = erase
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.CLASSIFIER
        mix, erase = build_batch_augmentation(cfg)
        return {
            "network": build_classification_network(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "label_smoothing": node.LABEL_SMOOTHING,
            "mix": mix,
            "erase": erase,
            "channels_last": node.CHANNELS_LAST,
        }

    @property
    def device(self) -> torch.device:
        """The device of the model and its images."""
        return self.pixel_mean.device

    def head_names(self) -> list[str]:
        """Returns the full names of the tensors that depend on the number of classes."""
        heads = self.network.get_classifier()
        # DeiT with distillation has two heads.
        heads = heads if isinstance(heads, (tuple, list)) else [heads]
        own = {id(tensor) for head in heads for tensor in head.parameters()}
        return [name for name, tensor in self.named_parameters() if id(tensor) in own]

    def forward(self, batch: Sequence[dict]) -> dict[str, Tensor] | list[dict]:
        """Returns losses in training, logits otherwise.

        Args:
            batch: dicts with ``image`` (3, H, W) with values from 0 to 255, all of the same size,
                and in training ``label``, an integer; or an :class:`ImageBatch`.

        Returns:
            ``{"loss_cls": ...}``, or for each image ``{"logits": (classes,)}``.
        """
        stacked = isinstance(batch, ImageBatch)
        images = batch.images if stacked else torch.stack([each["image"] for each in batch])
        # Do not block, because the GPU may still be running the previous step.
        images = images.to(self.device, non_blocking=True)
        images = (images - self.pixel_mean) / self.pixel_std
        if not self.training:
            logits = self.network(images.contiguous(memory_format=self.memory_format))
            return [{"logits": each} for each in logits.float()]
        labels = torch.tensor([each["label"] for each in batch])
        labels = labels.to(self.device, non_blocking=True)
        if self.erase is not None:
            images = self.erase(images)
        smoothing = self.label_smoothing
        if self.mix is not None:
            images, labels = self.mix(images, labels)
            smoothing = 0.0  # mixed labels are already smoothed
        logits = self.network(images.contiguous(memory_format=self.memory_format))
        return {"loss_cls": F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)}


def build_batch_augmentation(cfg: CfgNode) -> tuple[Mixup | None, RandomErasing | None]:
    """Builds a classifier's augmentations of batches; each is None if it is disabled.

    Returns:
        Mixup and CutMix, which also smooth the labels; and random erasing, which is applied first.
    """
    node, mix, erase = cfg.MODEL.CLASSIFIER, None, None
    if node.MIXUP_ALPHA or node.CUTMIX_ALPHA:
        mix = Mixup(
            mixup_alpha=node.MIXUP_ALPHA,
            cutmix_alpha=node.CUTMIX_ALPHA,
            prob=node.MIX_PROB,
            switch_prob=node.CUTMIX_PROB,
            label_smoothing=node.LABEL_SMOOTHING,
            num_classes=node.NUM_CLASSES,
        )
    if cfg.INPUT.CLASSIFIER.RANDOM_ERASING:
        erase = RandomErasing(
            cfg.INPUT.CLASSIFIER.RANDOM_ERASING, mode="pixel", device=cfg.MODEL.DEVICE
        )
    return mix, erase


def classifier_name(cfg: CfgNode) -> str:
    """Returns MODEL.CLASSIFIER.NAME without timm's tag of weights, which follows a dot."""
    return cfg.MODEL.CLASSIFIER.NAME.partition(".")[0]


def contnet_options(cfg: CfgNode) -> dict:
    """Returns ConTNet's arguments from ``cfg.MODEL.CONTNET``, for a classifier or a backbone."""
    values = {key.lower(): cfg.MODEL.CONTNET[key] for key in _ARGUMENT_KEYS}
    # A negative rate keeps the variant's default.
    return {name: value for name, value in values.items() if value >= 0}


def _check_sizes(cfg: CfgNode, network: nn.Module) -> None:
    """Checks that a network with patch embeddings accepts the config's image sizes."""
    embed = getattr(network, "patch_embed", None)
    for key in ("SIZE", "CROP_TEST") if embed is not None else ():
        size = cfg.INPUT.CLASSIFIER[key]
        try:
            with torch.no_grad():
                embed(torch.zeros(1, len(cfg.MODEL.PIXEL_MEAN), size, size))
        except AssertionError as error:
            raise UsageError(
                f"INPUT.CLASSIFIER.{key} is {size}, which {cfg.MODEL.CLASSIFIER.NAME} does not "
                f"take ({error}): change it, or where timm's model has the option add "
                "[dynamic_img_size, True] to MODEL.CLASSIFIER.OPTIONS"
            ) from error


def build_classification_network(cfg: CfgNode) -> nn.Module:
    """Builds the network that MODEL.CLASSIFIER names, without weights.

    Raises:
        UserError: if timm does not accept these options, or the network does not accept the image
            sizes in INPUT.CLASSIFIER.
    """
    node = cfg.MODEL.CLASSIFIER
    if classifier_name(cfg) not in VARIANTS:
        options = dict(node.OPTIONS)
        if node.DROP_PATH_RATE:
            options["drop_path_rate"] = node.DROP_PATH_RATE
        try:
            network = timm.create_model(node.NAME, num_classes=node.NUM_CLASSES, **options)
        except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                f"MODEL.CLASSIFIER.NAME {node.NAME}: timm does not take its options "
                f"{', '.join(options)} ({error}): see MODEL.CLASSIFIER.OPTIONS and DROP_PATH_RATE"
            ) from error
        _check_sizes(cfg, network)
        return network
    options = contnet_options(cfg)
    network = timm.create_model(node.NAME, num_classes=node.NUM_CLASSES, **options)
    network.set_grad_checkpointing(cfg.MODEL.CONTNET.GRAD_CHECKPOINTING)
    return network
