"""Registers ImageNet, and a user's own data sets by DATASETS.REGISTER."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from contnet.config.values import REGISTER_FORM
from contnet.data.datasets.classes import CLASS_KEYS, IMAGE_LABELS
from contnet.data.datasets.classification import EVALUATOR_TYPE, ClassificationSource
from contnet.data.datasets.imagenet import register_classification, register_imagenet
from contnet.data.datasets.imagenet_labels import LABEL_ENDINGS, is_label_file
from contnet.utils.errors import UserError

__all__ = ["class_key", "is_classification", "is_registered", "register_datasets"]


def register_datasets(cfg: CfgNode) -> None:
    """Registers ImageNet and the sets of DATASETS.REGISTER; again with the same paths is fine.

    Nothing is read: a set's files are looked at when it is used.

    Raises:
        UserError: for a name that stands for another data set, and a file without a folder.
    """
    register_imagenet()
    for name, *paths in cfg.DATASETS.REGISTER:
        if len(paths) == 1 and paths[0].lower().endswith((".json", *LABEL_ENDINGS)):
            raise UserError(f"DATASETS.REGISTER has {[name, *paths]!r}, {REGISTER_FORM}")
        if name not in DatasetCatalog.list():
            _register(name, paths)
        elif (taken := _paths(name)) != paths:
            raise UserError(
                f"DATASETS.REGISTER: the name {name} is taken already, by "
                f"{taken[0] if taken else 'a built-in data set'}: choose another"
            )


def _register(name: str, paths: list[str]) -> None:
    """Registers an entry of DATASETS.REGISTER, whose paths tell its kind."""
    *file, folder = paths
    if not file or is_label_file(file[0]):
        register_classification(name, ClassificationSource(folder, *file))
    else:
        register_coco_instances(name, {}, file[0], folder)


def _paths(name: str) -> list[str]:
    """The paths that a name stands for, as DATASETS.REGISTER gives them; none of built-in sets."""
    metadata = MetadataCatalog.get(name)
    if source := metadata.get("source"):
        return [path for path in (source.label_file, source.image_dir) if path]
    paths = [metadata.get("json_file"), metadata.get("image_root")]
    return [path for path in paths if path]


def is_registered(cfg: CfgNode, name: str) -> bool:
    """Whether a data set is one of DATASETS.REGISTER."""
    return name in [entry[0] for entry in cfg.DATASETS.REGISTER]


def is_classification(name: str) -> bool:
    """Whether a registered data set is one to classify images."""
    return MetadataCatalog.get(name).get("evaluator_type") == EVALUATOR_TYPE


def class_key(cfg: CfgNode, name: str) -> str | None:
    """The key of the number of classes that a data set of DATASETS.REGISTER decides.

    Returns:
        None for other data sets, and for models that have no use for such a set.
    """
    if not is_registered(cfg, name):
        return None
    kind = IMAGE_LABELS if is_classification(name) else "objects"
    return CLASS_KEYS.get(cfg.MODEL.META_ARCHITECTURE, {}).get(kind)
