"""Augmentations that work on extremely thin images.

Detectron2 rounds sizes, so the shorter side of an image that is a thousand times as long as wide,
or of a crop, may become 0. Here, it is at least 1. All other sizes, and the random draws, are
Detectron2's.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from detectron2.data import transforms as T
from detectron2.modeling import test_time_augmentation

__all__ = ["RandomCrop", "ResizeShortestEdge", "keep_a_pixel", "keep_a_pixel_in_tta"]


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's ResizeShortestEdge, with sides of at least one pixel."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform


class RandomCrop(T.RandomCrop):
    """Detectron2's RandomCrop, with sides of at least one pixel."""

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = super().get_crop_size(image_size)
        return max(1, height), max(1, width)


def _kept(augmentation: T.Augmentation) -> T.Augmentation:
    if type(augmentation) is T.ResizeShortestEdge:
        lengths, style = augmentation.short_edge_length, augmentation.sample_style
        return ResizeShortestEdge(lengths, augmentation.max_size, style, augmentation.interp)
    if type(augmentation) is T.RandomCrop:
        return RandomCrop(augmentation.crop_type, augmentation.crop_size)
    if type(augmentation) is T.RandomCrop_CategoryAreaConstraint:
        augmentation.crop_aug = _kept(augmentation.crop_aug)
    return augmentation


def keep_a_pixel(augmentations: Iterable[T.Augmentation]) -> list[T.Augmentation]:
    """Replaces Detectron2's augmentations by the ones above."""
    return [_kept(each) for each in augmentations]


def keep_a_pixel_in_tta() -> None:
    """Makes Detectron2's test-time augmentation use the ResizeShortestEdge above."""
    test_time_augmentation.ResizeShortestEdge = ResizeShortestEdge
