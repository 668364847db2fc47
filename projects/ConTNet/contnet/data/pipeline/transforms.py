"""Transforms of input images: timm's for classification, Detectron2's for segmentation."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import transforms_imagenet_train
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from torchvision.transforms.functional import center_crop

from contnet.modeling.thin_images import keep_a_pixel

__all__ = ["LONGEST", "build_classification_transform", "build_segmentation_augmentation"]

# Largest ratio of an image's sides in classification; the ends of longer images are cut off.
LONGEST = 16


def build_segmentation_augmentation(cfg: CfgNode) -> list[T.Augmentation]:
    """Builds Detectron2's augmentation; after the resize, a crop that limits any single class."""
    augmentations = detection_utils.build_augmentation(cfg, is_train=True)
    crop = cfg.INPUT.CROP
    if crop.ENABLED:
        # Detectron2 puts the resize first and the flips after it.
        augmentations.insert(
            1,
            T.RandomCrop_CategoryAreaConstraint(
                crop.TYPE,
                crop.SIZE,
                crop.SINGLE_CATEGORY_MAX_AREA,
                cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            ),
        )
    return keep_a_pixel(augmentations)


def _cut_ends(image: Image.Image) -> Image.Image:
    """Crops a very long image to its middle, which is all that a centre crop shows of it.

    Otherwise, resizing its short side would make the image gigabytes large.
    """
    longest = LONGEST * min(image.size)
    if max(image.size) <= longest:
        return image
    return center_crop(image, [min(side, longest) for side in reversed(image.size)])


class _RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop, with crops of at least one pixel."""

    @staticmethod
    def get_params(img: Image.Image, scale: tuple, ratio: tuple) -> tuple[int, int, int, int]:
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(img, scale, ratio)
        bottom, right = img.height - max(1, height), img.width - max(1, width)
        return min(top, bottom), min(left, right), max(1, height), max(1, width)


def _keep_a_pixel(transform: object) -> object:
    """Replaces timm's random resized crop by the one above."""
    if type(transform) is not RandomResizedCropAndInterpolation:
        return transform
    crop = _RandomResizedCrop(transform.size, transform.scale, transform.ratio)
    crop.interpolation = transform.interpolation
    return crop


def build_classification_transform(cfg: CfgNode, is_train: bool) -> Callable[[Image.Image], object]:
    """Builds timm's augmentation for training, or a resize and a centre crop for testing.

    Args:
        cfg: INPUT.CLASSIFIER, INPUT.RANDOM_FLIP and the pixel statistics are read.
        is_train: whether to build the training transform.

    Returns:
        A function from an RGB image to a uint8 tensor (3, H, W).
    """
    node = cfg.INPUT.CLASSIFIER
    if not is_train:
        interpolation = InterpolationMode(node.INTERPOLATION_TEST)
        resize, crop = Resize(node.RESIZE_TEST, interpolation), CenterCrop(node.CROP_TEST)
        return Compose([_cut_ends, resize, crop, PILToTensor()])
    transform = transforms_imagenet_train(
        node.SIZE,
        scale=node.SCALE,
        ratio=node.RATIO,
        hflip=0.5 * (cfg.INPUT.RANDOM_FLIP == "horizontal"),
        vflip=0.5 * (cfg.INPUT.RANDOM_FLIP == "vertical"),
        color_jitter=node.COLOR_JITTER or None,
        auto_augment=node.AUTO_AUGMENT or None,
        interpolation=node.INTERPOLATION,
        # Some of the policies fill borders with it.
        mean=[value / 255 for value in cfg.MODEL.PIXEL_MEAN],
        # The model does the normalisation, and the erasing after it.
        use_prefetcher=True,
    )
    transform.transforms = [_keep_a_pixel(each) for each in transform.transforms]
    return transform
