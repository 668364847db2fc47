"""A user's own data sets, by DATASETS.REGISTER, and the number of classes that they ask for."""

from __future__ import annotations

from collections.abc import Iterable

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from contnet.data.datasets.imagenet import (
    EVALUATOR_TYPE,
    LABELS,
    Source,
    count_labels,
    register_classification,
    register_imagenet,
)
from contnet.data.datasets.imagenet_labels import is_label_file
from contnet.data.pipeline.annotations import examine_coco
from contnet.modeling.pspnet import SEGMENTORS
from contnet.utils.errors import UserError

__all__ = [
    "CLASS_KEYS",
    "class_key",
    "count_classes",
    "is_registered",
    "learned_classes",
    "register_datasets",
]

# By meta-architecture: the keys of the numbers of classes, by what a data set has.
CLASS_KEYS: dict[str, dict[str, str]] = {
    "GeneralizedRCNN": {"objects": "MODEL.ROI_HEADS.NUM_CLASSES"},
    "RetinaNet": {"objects": "MODEL.RETINANET.NUM_CLASSES"},
    "FCOS": {"objects": "MODEL.FCOS.NUM_CLASSES"},
    "ImageClassifier": {LABELS: "MODEL.CLASSIFIER.NUM_CLASSES"},
    **{name: {"label maps": "MODEL.SEM_SEG_HEAD.NUM_CLASSES"} for name in SEGMENTORS},
    "PanopticFPN": {
        "objects": "MODEL.ROI_HEADS.NUM_CLASSES",
        "label maps": "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    },
}


def register_datasets(cfg: CfgNode) -> None:
    """Registers ImageNet and the sets of DATASETS.REGISTER; again with the same paths is fine.

    Nothing is read: a set's files are looked at when it is used.

    Raises:
        UserError: for a name that stands for another data set.
    """
    register_imagenet()
    for name, *paths in cfg.DATASETS.REGISTER:
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
        register_classification(name, Source(folder, *file))
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


def class_key(cfg: CfgNode, name: str) -> str | None:
    """The key of the number of classes that a data set of DATASETS.REGISTER decides.

    Returns:
        None for other data sets, and for models that have no use for such a set.
    """
    if not is_registered(cfg, name):
        return None
    kind = LABELS if _is_classification(name) else "objects"
    return CLASS_KEYS.get(cfg.MODEL.META_ARCHITECTURE, {}).get(kind)


def _is_classification(name: str) -> bool:
    return MetadataCatalog.get(name).get("evaluator_type") == EVALUATOR_TYPE


def count_classes(cfg: CfgNode, name: str) -> int:
    """The number of classes of a data set of DATASETS.REGISTER, by its file or folder.

    Args:
        cfg: as for :func:`contnet.data.pipeline.annotations.examine_coco`.
        name: of the data set.

    Raises:
        UserError: if that cannot be read.
    """
    if _is_classification(name):
        return count_labels(name, MetadataCatalog.get(name).source)
    try:
        return len(examine_coco(cfg, name).findings.classes["objects"])
    except UserError as error:
        raise UserError(f"data set {name}: {error}") from error


def learned_classes(cfg: CfgNode, names: Iterable[str]) -> list[str] | None:
    """Names of the classes that the model tells apart, in the order of its outputs.

    Args:
        cfg: MODEL.META_ARCHITECTURE is read.
        names: of loaded data sets, which agree about their classes.

    Returns:
        None where no data set names them, or the model has more than one kind of them.
    """
    kinds = CLASS_KEYS.get(cfg.MODEL.META_ARCHITECTURE, {})
    if len(kinds) != 1:
        return None
    fact = "stuff_classes" if "label maps" in kinds else "thing_classes"
    known = (MetadataCatalog.get(name).get(fact) for name in names)
    return next((list(classes) for classes in known if classes), None)
