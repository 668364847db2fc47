"""The classes of data sets: the config keys that count them, their names, and comparing them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from contnet.modeling.pspnet import SEGMENTORS

__all__ = ["CLASS_KEYS", "IMAGE_LABELS", "dataset_class_names", "distinct_class_names"]

# What classification sets have, where others have objects or label maps.
IMAGE_LABELS = "labels of images"

# By meta-architecture: the keys of the numbers of classes, by what a data set has.
CLASS_KEYS: dict[str, dict[str, str]] = {
    "GeneralizedRCNN": {"objects": "MODEL.ROI_HEADS.NUM_CLASSES"},
    "RetinaNet": {"objects": "MODEL.RETINANET.NUM_CLASSES"},
    "FCOS": {"objects": "MODEL.FCOS.NUM_CLASSES"},
    "ImageClassifier": {IMAGE_LABELS: "MODEL.CLASSIFIER.NUM_CLASSES"},
    **{name: {"label maps": "MODEL.SEM_SEG_HEAD.NUM_CLASSES"} for name in SEGMENTORS},
    "PanopticFPN": {
        "objects": "MODEL.ROI_HEADS.NUM_CLASSES",
        "label maps": "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    },
}


def dataset_class_names(cfg: CfgNode, names: Iterable[str]) -> list[str] | None:
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


def distinct_class_names(names: Sequence[str], ids: Sequence[int]) -> list[str]:
    """The names, with ``(id N)`` after those that several classes have.

    Args:
        names: of classes.
        ids: of the same classes in the data set's file.
    """
    distinct = list(names)
    while len(counts := Counter(distinct)) < len(distinct):
        distinct = [
            f"{name} (id {number})" if counts[name] > 1 else name
            for name, number in zip(distinct, ids, strict=True)
        ]
    return distinct
