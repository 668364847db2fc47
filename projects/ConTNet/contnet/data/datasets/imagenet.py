"""Registers data sets for image classification, including ImageNet, with Detectron2."""

from __future__ import annotations

import logging
import os
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import log_first_n

from contnet.data.datasets.classification import (
    EVALUATOR_TYPE,
    ClassificationSource,
    read_set,
)
from contnet.data.findings import ERROR, NOTE, Findings
from contnet.utils.errors import UserError

__all__ = ["register_classification", "register_imagenet"]

_DOCTOR = "python tools/doctor.py with this config"


def _load(name: str, source: ClassificationSource) -> list[dict]:
    findings = Findings()
    if not os.path.isdir(source.image_dir):
        raise UserError(
            f"data set {name}: the folder {os.path.abspath(source.image_dir)} does not exist"
        )
    content = read_set(source, findings)
    if errors := findings.lines(ERROR):
        raise UserError(f"data set {name}: {errors[0]}; run {_DOCTOR} for all")
    for note in findings.lines(NOTE):
        # Once, not at each evaluation.
        log_first_n(logging.WARNING, f"{name}: {note}", key="message", name=__name__)
    metadata = MetadataCatalog.get(name)
    # Detectron2's key for class names; it treats "class_names" as an old form of this key.
    learned = {"thing_classes": content.classes, "label_file": content.label_file}
    for key, value in learned.items():
        if hasattr(metadata, key):  # read from files that may have changed
            delattr(metadata, key)
        if value:
            setattr(metadata, key, value)
    return content.records


def register_classification(name: str, source: ClassificationSource) -> None:
    """Registers a data set with Detectron2; nothing is read before it is used.

    Its metadata are ``evaluator_type``, ``image_dir``, ``source``, ``label_file`` if one is used,
    and after loading ``thing_classes``, the class names, if they are known.
    """
    DatasetCatalog.register(name, partial(_load, name, source))
    metadata = MetadataCatalog.get(name)
    metadata.set(evaluator_type=EVALUATOR_TYPE, image_dir=source.image_dir, source=source)
    if source.label_file:
        metadata.label_file = source.label_file


def register_imagenet() -> None:
    """Registers imagenet_train and imagenet_val in the current $DETECTRON2_DATASETS/imagenet.

    Without the variable, ``./datasets`` is used.
    """
    root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    home = os.path.join(root, "imagenet")
    train = os.path.join(home, "train")
    sources = {
        "imagenet_train": ClassificationSource(train),
        "imagenet_val": ClassificationSource(os.path.join(home, "val"), home=home, train_dir=train),
    }
    for name, source in sources.items():
        if name in DatasetCatalog.list():
            if MetadataCatalog.get(name).get("source") in (None, source):
                continue
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_classification(name, source)
