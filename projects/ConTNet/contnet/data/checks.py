"""What can be wrong with a data set, said before training starts."""

from __future__ import annotations

import difflib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from contnet.errors import UserError

__all__ = ["check_datasets", "load_dicts"]


def _root() -> str:
    value = os.environ.get("DETECTRON2_DATASETS")
    if value is not None:
        return f"DETECTRON2_DATASETS is {value!r}"
    return (
        f"DETECTRON2_DATASETS is not set: data sets are looked for in {Path('datasets').resolve()}"
    )


def _check_registered(name: str) -> None:
    if name in DatasetCatalog.list():
        return
    near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"data set {name!r} is not registered{hint}")


def check_datasets(names: Iterable[str]) -> None:
    """Checks that data sets are registered and their annotations and image folders exist.

    Raises:
        UserError: naming the first file that is missing, where it was looked for, and the root.
    """
    for name in names:
        _check_registered(name)
        metadata = MetadataCatalog.get(name)
        for fact in ("json_file", "image_root"):
            path = metadata.get(fact)
            if path and not os.path.exists(path):
                what = "annotation file" if fact == "json_file" else "image folder"
                raise UserError(
                    f"data set {name}: the {what} {Path(path).resolve()} does not exist ({_root()})"
                )


def _check_images(name: str, dicts: Sequence[dict]) -> None:
    by_folder = defaultdict(list)
    for record in dicts:
        folder, file = os.path.split(record["file_name"])
        by_folder[folder].append(file)
    missing = []
    for folder, files in by_folder.items():
        present = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        missing += [os.path.join(folder, file) for file in files if file not in present]
    if missing:
        raise UserError(
            f"data set {name}: {len(missing)} of {len(dicts)} images are missing, "
            f"e.g. {', '.join(missing[:3])} ({_root()})"
        )


def _check_classes(cfg: CfgNode, name: str) -> None:
    classes = MetadataCatalog.get(name).get("thing_classes")
    expected = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and classes and len(classes) != expected:
        raise UserError(
            f"data set {name} has {len(classes)} classes, but MODEL.ROI_HEADS.NUM_CLASSES is "
            f"{expected}: set it to {len(classes)}"
        )


def load_dicts(cfg: CfgNode, names: Sequence[str], train: bool) -> list[dict]:
    """Loads data sets and checks that their images are there and their classes fit the model.

    Args:
        cfg: DATALOADER.FILTER_EMPTY_ANNOTATIONS and MODEL are read.
        names: of registered data sets.
        train: leave out images without annotations, if the config says so.

    Raises:
        UserError: for annotations that are not COCO's or give no image, for missing images, and for
            a wrong number of classes.
    """
    filter_empty = train and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    every = []
    for name in names:
        file = MetadataCatalog.get(name).get("json_file", name)
        try:
            dicts = get_detection_dataset_dicts(name, filter_empty=filter_empty)
        except json.JSONDecodeError as error:
            raise UserError(f"data set {name}: {file} is not valid JSON ({error})") from error
        except KeyError as error:
            raise UserError(
                f"data set {name}: {file} has not the form of COCO instances, {error} is missing"
            ) from error
        except AssertionError as error:
            raise UserError(f"data set {name}: {file} gives no image to use ({error})") from error
        _check_images(name, dicts)
        _check_classes(cfg, name)
        every += dicts
    return every
