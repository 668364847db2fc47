"""Registers ImageNet and the data sets of DATASETS.REGISTER, and determines a data set's kind.

The metadata of a data set that is registered here has the ``source`` of its records, whose class is
its kind. For COCO and Cityscapes under Detectron2's names, the source follows from Detectron2's
metadata. Other data sets have no source: each process loads them with their own loader, and they
are not checked.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from contnet.config.values import REGISTER_FORM
from contnet.data.datasets.cityscapes import CityscapesSource
from contnet.data.datasets.classes import CLASS_KEYS, IMAGE_LABELS
from contnet.data.datasets.classification import ClassificationSource
from contnet.data.datasets.coco import CocoSource
from contnet.data.datasets.imagenet import register_classification, register_imagenet
from contnet.data.datasets.imagenet_labels import LABEL_ENDINGS, is_label_file
from contnet.utils.errors import UsageError

__all__ = [
    "class_key",
    "find_source",
    "is_registered",
    "register_coco",
    "register_datasets",
]

# Detectron2's names for COCO instances and keypoints, and for Cityscapes.
_SPLITS = (
    "2014_train",
    "2014_val",
    "2014_minival",
    "2014_valminusminival",
    "2017_train",
    "2017_val",
)
_COCO = {
    *(f"coco_{split}" for split in (*_SPLITS, "2017_test", "2017_test-dev", "2017_val_100")),
    *(f"keypoints_coco_{split}" for split in (*_SPLITS, "2017_val_100")),
}
_CITYSCAPES = {
    f"cityscapes_fine_{task}_{split}"
    for task in ("instance_seg", "sem_seg")
    for split in ("train", "val", "test")
}


def find_source(name: str) -> CocoSource | CityscapesSource | ClassificationSource | None:
    """Returns the source of a data set's records, whose class is the data set's kind.

    Returns:
        The source; None if the name is not registered, or the data set has its own loader.
    """
    if name not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(name)
    if name in _COCO and metadata.get("json_file"):
        return CocoSource(metadata.json_file, metadata.image_root)
    if name in _CITYSCAPES and metadata.get("gt_dir"):
        kind = metadata.evaluator_type
        return CityscapesSource(name, metadata.image_dir, metadata.gt_dir, kind)
    return metadata.get("source")


def register_coco(name: str, json_file: str, image_root: str) -> None:
    """Registers a data set in COCO format; nothing is read before it is used.

    Args:
        name: name for DATASETS.TRAIN and TEST.
        json_file: path of the annotation file.
        image_root: folder to which the image names in the file are relative.
    """
    register_coco_instances(name, {}, json_file, image_root)
    MetadataCatalog.get(name).source = CocoSource(json_file, image_root)


def register_datasets(cfg: CfgNode) -> None:
    """Registers ImageNet and the data sets of DATASETS.REGISTER; repeating it is harmless.

    No files are read before a data set is used.

    Raises:
        UserError: if a name belongs to another data set, or a file has no image folder.
    """
    register_imagenet()
    for name, *paths in cfg.DATASETS.REGISTER:
        if len(paths) == 1 and paths[0].lower().endswith((".json", *LABEL_ENDINGS)):
            raise UsageError(f"DATASETS.REGISTER has {[name, *paths]!r}, {REGISTER_FORM}")
        if name not in DatasetCatalog.list():
            _register(name, paths)
        elif (taken := _paths(name)) != paths:
            raise UsageError(
                f"DATASETS.REGISTER: the name {name} is already used by "
                f"{taken[0] if taken else 'another data set'}: choose another"
            )


def _register(name: str, paths: list[str]) -> None:
    """Registers an entry of DATASETS.REGISTER, whose paths determine its kind."""
    *file, folder = paths
    if not file or is_label_file(file[0]):
        register_classification(name, ClassificationSource(folder, *file))
    else:
        register_coco(name, file[0], folder)


def _paths(name: str) -> list[str]:
    """Returns a data set's paths as DATASETS.REGISTER has them; none if it has no such form."""
    match find_source(name):
        case ClassificationSource(image_dir, label_file):
            return [path for path in (label_file, image_dir) if path]
        case CocoSource(json_file, image_root):
            return [json_file, image_root]
    return []


def is_registered(cfg: CfgNode, name: str) -> bool:
    """Whether a data set is an entry of DATASETS.REGISTER."""
    return name in [entry[0] for entry in cfg.DATASETS.REGISTER]


def class_key(cfg: CfgNode, name: str) -> str | None:
    """Returns the config key of the number of classes that a data set of DATASETS.REGISTER sets.

    Returns:
        The key; None for other data sets, and for models that do not use this kind of data set.
    """
    if not is_registered(cfg, name):
        return None
    labelled = isinstance(find_source(name), ClassificationSource)
    kind = IMAGE_LABELS if labelled else "objects"
    return CLASS_KEYS.get(cfg.MODEL.META_ARCHITECTURE, {}).get(kind)
