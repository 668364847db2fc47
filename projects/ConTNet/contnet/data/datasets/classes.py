"""The classes of data sets: the config keys that count them, their names, and comparing them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from contnet.modeling.pspnet import SEGMENTORS

__all__ = ["CLASS_KEYS", "LABELS", "dataset_class_names", "describe_difference"]

# What classification sets have, where others have objects or label maps.
LABELS = "labels of images"
_SHOWN = 3

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


def describe_difference(classes: Sequence[str], expected: Sequence[str]) -> str:
    """Says how two lists of classes differ, "" if they do not."""
    here, there = set(classes), set(expected)
    parts = []
    for what, names in (("too many", here - there), ("missing", there - here)):
        if names:
            shown = ", ".join(sorted(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            parts.append(f"{len(names)} {what}: {shown}")
    if not parts and list(classes) != list(expected):
        pairs = zip(classes, expected, strict=True)
        number, (one, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        parts.append(f"another order: number {number} is {one} instead of {other}")
    return "; ".join(parts)
