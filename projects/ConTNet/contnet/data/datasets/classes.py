"""The classes of data sets: the config keys of their number, and their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from contnet.modeling.pspnet import SEGMENTORS

__all__ = ["CLASS_KEYS", "IMAGE_LABELS", "dataset_class_names", "distinct_class_names"]

# The annotations of classification sets; other sets have objects or label maps.
IMAGE_LABELS = "labels of images"

# Config keys of the number of classes, by meta-architecture and by kind of annotations.
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
    """Returns the names of the classes that the model predicts, in the order of its outputs.

    Args:
        cfg: MODEL.META_ARCHITECTURE is read.
        names: names of loaded data sets, which have the same classes.

    Returns:
        The names; None if no data set has them, or the model has several kinds of classes.
    """
    kinds = CLASS_KEYS.get(cfg.MODEL.META_ARCHITECTURE, {})
    if len(kinds) != 1:
        return None
    fact = "stuff_classes" if "label maps" in kinds else "thing_classes"
    known = (MetadataCatalog.get(name).get(fact) for name in names)
    return next((list(classes) for classes in known if classes), None)


def distinct_class_names(names: Sequence[str], ids: Sequence[int]) -> list[str]:
    """Returns the names, with ``(id N)`` added to those that several classes have.

    Args:
        names: names of the classes.
        ids: ids of the same classes in the data set's file.
    """
    distinct = list(names)
    while len(counts := Counter(distinct)) < len(distinct):
        distinct = [
            f"{name} (id {number})" if counts[name] > 1 else name
            for name, number in zip(distinct, ids, strict=True)
        ]
    return distinct
