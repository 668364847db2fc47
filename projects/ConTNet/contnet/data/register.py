"""A user's own data sets, by DATASETS.REGISTER, and the number of classes that they ask for."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from contnet.data.coco_checks import class_names, read_instances
from contnet.errors import UserError
from contnet.modeling.pspnet import SEGMENTORS

__all__ = ["CLASS_KEYS", "class_key", "count_classes", "is_registered", "register_datasets"]

# By meta-architecture: the keys of the numbers of classes of objects and of label maps.
CLASS_KEYS: dict[str, dict[str, str]] = {
    "GeneralizedRCNN": {"objects": "MODEL.ROI_HEADS.NUM_CLASSES"},
    "RetinaNet": {"objects": "MODEL.RETINANET.NUM_CLASSES"},
    "FCOS": {"objects": "MODEL.FCOS.NUM_CLASSES"},
    **{name: {"label maps": "MODEL.SEM_SEG_HEAD.NUM_CLASSES"} for name in SEGMENTORS},
    "PanopticFPN": {
        "objects": "MODEL.ROI_HEADS.NUM_CLASSES",
        "label maps": "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    },
}


def register_datasets(cfg: CfgNode) -> None:
    """Registers the sets of DATASETS.REGISTER; again with the same paths is fine.

    Nothing is read: a set's file is looked at when it is used.

    Raises:
        UserError: for a name that stands for another data set.
    """
    for name, file, folder in cfg.DATASETS.REGISTER:
        if name not in DatasetCatalog.list():
            register_coco_instances(name, {}, file, folder)
            continue
        metadata = MetadataCatalog.get(name)
        if (metadata.get("json_file"), metadata.get("image_root")) != (file, folder):
            raise UserError(
                f"DATASETS.REGISTER: the name {name} is taken already, by "
                f"{metadata.get('json_file', 'a built-in data set')}: choose another"
            )


def is_registered(cfg: CfgNode, name: str) -> bool:
    """Whether a data set is one of DATASETS.REGISTER."""
    return name in [entry[0] for entry in cfg.DATASETS.REGISTER]


def class_key(cfg: CfgNode, name: str) -> str | None:
    """The key of the number of classes that a data set of DATASETS.REGISTER decides.

    Returns:
        None for other data sets, and for models that detect no objects.
    """
    if not is_registered(cfg, name):
        return None
    return CLASS_KEYS.get(cfg.MODEL.META_ARCHITECTURE, {}).get("objects")


def count_classes(name: str) -> int:
    """The number of classes in the annotation file of a data set of DATASETS.REGISTER.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        return len(class_names(read_instances(MetadataCatalog.get(name).json_file)))
    except UserError as error:
        raise UserError(f"data set {name}: {error}") from error
