"""What happens to a training image before the network sees it."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T

from contnet.modeling.pspnet import SEGMENTORS

__all__ = ["build_train_mapper"]


def _segmentation_augmentation(cfg: CfgNode) -> list[T.Augmentation]:
    """Detectron2's, with the crop after the resize and no crop of a single class."""
    augmentations = detection_utils.build_augmentation(cfg, is_train=True)
    crop = cfg.INPUT.CROP
    if crop.ENABLED:
        # Detectron2's resize comes first, its flips after it.
        augmentations.insert(
            1,
            T.RandomCrop_CategoryAreaConstraint(
                crop.TYPE,
                crop.SIZE,
                crop.SINGLE_CATEGORY_MAX_AREA,
                cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            ),
        )
    return augmentations


def build_train_mapper(cfg: CfgNode) -> DatasetMapper:
    """Detectron2's mapper from a data set dict to a model input, with the model's augmentation."""
    if cfg.MODEL.META_ARCHITECTURE in SEGMENTORS:
        return DatasetMapper(cfg, is_train=True, augmentations=_segmentation_augmentation(cfg))
    return DatasetMapper(cfg, is_train=True)
