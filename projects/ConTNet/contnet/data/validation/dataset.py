"""Checks data sets as a config uses them.

A training run makes these checks before it starts and opens the first images; tools/doctor.py makes
them, too, and opens all images.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from contnet.data.datasets.cityscapes import CityscapesSource, find_scenes
from contnet.data.datasets.classes import IMAGE_LABELS
from contnet.data.datasets.classification import ClassificationSource, read_set
from contnet.data.datasets.coco import CocoSource
from contnet.data.datasets.image_files import find_beside, find_missing, match_names
from contnet.data.datasets.register import find_source, is_registered
from contnet.data.findings import ERROR, SUSPECT, WARNING, Findings
from contnet.data.validation.cityscapes import inspect_images
from contnet.data.validation.classes import check_classes
from contnet.data.validation.examine import examine_cityscapes, examine_coco
from contnet.data.validation.images import (
    FIRST,
    ImageRules,
    Look,
    find_listed,
    inspect_image,
    inspect_listed,
    look_at_images,
)
from contnet.data.validation.masks import FIX_HINT
from contnet.utils.cpus import available_cpus
from contnet.utils.errors import UserError
from contnet.utils.files import describe_kind
from contnet.utils.text import plural

__all__ = [
    "OFFICIAL_COUNTS",
    "Remarks",
    "check_dataset",
    "check_datasets",
    "examine_dataset",
    "has_truth",
]

_DOCTOR = "python tools/doctor.py"
# By built-in name: its publisher, and its numbers of images and objects, or images and classes.
OFFICIAL_COUNTS = {
    "coco_2017_train": ("COCO", (118287, 860001)),
    "coco_2017_val": ("COCO", (5000, 36781)),
    "imagenet_train": ("ImageNet", (1281167, 1000)),
    "imagenet_val": ("ImageNet", (50000, 1000)),
}
_FOLDERS = {
    "json_file": "annotation file",
    "image_root": "image folder",
    "image_dir": "image folder",
    "gt_dir": "label folder",
    "label_file": "label file",
}


def _page(name: str) -> str:
    """Returns the page that describes the layout of a built-in data set."""
    pages = {CityscapesSource: "docs/cityscapes.md", ClassificationSource: "docs/imagenet.md"}
    return pages.get(type(find_source(name)), "docs/data.md")


def _origin(cfg: CfgNode, name: str) -> str:
    """Returns where the paths of a data set come from, for a message."""
    if is_registered(cfg, name):
        return "fix its path in DATASETS.REGISTER"
    value = os.environ.get("DETECTRON2_DATASETS")
    if value is not None:
        return f"DETECTRON2_DATASETS is {value!r}, {_page(name)} shows the expected files"
    folder = os.path.realpath("datasets")
    return f"DETECTRON2_DATASETS is not set: data sets are looked for in {folder}"


def _are_there(cfg: CfgNode, name: str, findings: Findings) -> bool:
    """Whether a data set is registered and its files and folders exist."""
    if name not in DatasetCatalog.list():
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        findings.error(f"it is not registered, add your own to DATASETS.REGISTER{hint}")
        return False
    metadata = MetadataCatalog.get(name)
    whole = True
    for fact, what in _FOLDERS.items():
        path = metadata.get(fact)
        if not path:
            continue
        if fact == "gt_dir" and Path(path).name == "test" and not os.path.exists(path):
            continue  # only Cityscapes' server has it
        place = os.path.realpath(path)
        findings.fact(f"{what} {place}")
        if not os.path.exists(path):
            whole = False
            kind = "" if describe_kind(path) == "missing" else f": it is {describe_kind(path)}"
            findings.error(f"the {what} {place} does not exist{kind} ({_origin(cfg, name)})")
    return whole


def _check_files(cfg: CfgNode, name: str, images: Sequence[str], findings: Findings) -> None:
    root = find_source(name).image_root
    missing = []
    for image in find_missing(root, images):
        kind = describe_kind(path := os.path.join(root, image))
        if kind in ("", "missing", "a broken link"):
            missing.append(image)
        else:
            findings.error("images whose path is not a file", f"{path} ({kind})")
    if not missing:
        return
    matches = match_names(root, missing, images)
    for image, match in matches.items():
        what = f"images that have other names in the folder ({match.difference}): {FIX_HINT}"
        findings.error(what, f"{image!a} is {match.path!a}")
    if lost := [image for image in missing if image not in matches]:
        advice = _advise(cfg, name, lost, len(set(images)))
        for image in lost:
            path = os.path.join(root, image)
            findings.error(f"missing images ({advice})", path)


def _advise(cfg: CfgNode, name: str, lost: Sequence[str], total: int) -> str:
    """Returns what to do about missing images."""
    how_many = f"{len(lost)} of {total}"
    # If only some are missing, another folder may have other images of these names (train, val).
    if len(lost) < total:
        return f"{how_many}; copy them, or remove them from a copy of the file: {_DOCTOR} --fix"
    if folder := find_beside(find_source(name).image_root, lost):
        return f"{how_many}; did you mean the folder {folder}?"
    return f"{how_many}; {_origin(cfg, name)}"


def _compare_count(name: str, count: tuple[int, int], what: str, findings: Findings) -> None:
    """Compares the counts of a built-in data set with the official ones."""
    if name not in OFFICIAL_COUNTS:
        return
    who, official = OFFICIAL_COUNTS[name]
    if count == official:
        findings.fact(f"as many as {who} has")
        return
    findings.warn(
        f"{plural(count[0], 'image')} and {plural(count[1], what)}, {who} has "
        f"{official[0]} and {official[1]}"
    )


def _check_coco(cfg: CfgNode, name: str, findings: Findings) -> Look | None:
    metadata = MetadataCatalog.get(name)
    try:
        examined = examine_coco(cfg, name)
    except UserError as error:
        findings.error(str(error))
        return None
    findings.merge(examined.findings)
    _check_files(cfg, name, examined.images, findings)
    # Only built-in data sets have class names before the file is loaded.
    expected = metadata.get("thing_classes")
    if expected and list(expected) != findings.classes["objects"]:
        findings.error(
            f"its file has other categories than {name}, which stands for {len(expected)} classes "
            f"({', '.join(expected[:3])}, ...): give a data set of your own another name in "
            "DATASETS.REGISTER"
        )
    _compare_count(name, (len(examined.images), examined.objects), "object", findings)
    inspect = partial(inspect_listed, rules=ImageRules.from_config(cfg))
    return Look(inspect, examined.first, partial(find_listed, name))


def _check_cityscapes(cfg: CfgNode, name: str, findings: Findings) -> Look | None:
    metadata = MetadataCatalog.get(name)
    kind = metadata.evaluator_type
    if kind == "cityscapes_sem_seg":
        findings.classes["label maps"] = list(metadata.stuff_classes)
    else:
        findings.classes["objects"] = list(metadata.thing_classes)
    try:
        findings.merge(examine_cityscapes(cfg, name))
    except UserError as error:
        findings.error(str(error))
        return None
    scenes = find_scenes(metadata.image_dir, metadata.gt_dir, kind)
    inspect = partial(inspect_images, rules=ImageRules.from_config(cfg))
    return Look(inspect, scenes[:FIRST], lambda: scenes)


def _check_classification(cfg: CfgNode, name: str, findings: Findings) -> Look | None:
    content = read_set(find_source(name), findings)
    if not content.records:
        return None
    number = content.number_of_classes
    findings.classes[IMAGE_LABELS] = content.classes or [f"class {i}" for i in range(number)]
    findings.named = content.classes is not None
    _compare_count(name, (len(content.records), number), "class", findings)
    inspect = partial(inspect_image, rules=ImageRules.from_config(cfg))
    look = Look(inspect, content.records[:FIRST], lambda: content.records)
    if name not in cfg.DATASETS.TRAIN or cfg.MODEL.META_ARCHITECTURE != "ImageClassifier":
        return look
    wanted = {"ASPECT_RATIO_GROUPING": False, "SAMPLER_TRAIN": "TrainingSampler"}
    for key, value in wanted.items():
        if cfg.DATALOADER[key] != value:
            findings.error(
                f"DATALOADER.{key} is {cfg.DATALOADER[key]}, labelled images require {value}"
            )
    return look


# By kind of data set: adds findings, and returns what opens the images.
_CHECKS: dict[type, Callable[[CfgNode, str, Findings], Look | None]] = {
    CocoSource: _check_coco,
    CityscapesSource: _check_cityscapes,
    ClassificationSource: _check_classification,
}


def examine_dataset(cfg: CfgNode, name: str) -> tuple[Findings, Look | None]:
    """Returns a data set's findings, found without opening its images, and what opens them.

    Args:
        cfg: DATASETS, DATALOADER, MODEL and INPUT are read.
        name: name of the data set, registered or not.
    """
    findings = Findings()
    if not _are_there(cfg, name, findings):
        return findings, None
    kind = type(find_source(name))
    if kind in _CHECKS:
        return findings, _CHECKS[kind](cfg, name, findings)
    findings.note("it has its own loader, so it is not checked")
    return findings, None


def check_dataset(cfg: CfgNode, name: str) -> Findings:
    """Returns the findings of :func:`examine_dataset`."""
    return examine_dataset(cfg, name)[0]


def _raise_errors(found: dict[str, Findings]) -> None:
    errors = [(name, line) for name in found for line in found[name].lines(ERROR)]
    if errors:
        name, line = errors[0]
        more = f" (and {len(errors) - 1} more kinds of errors)" if len(errors) > 1 else ""
        raise UserError(f"data set {name}: {line}{more}; run {_DOCTOR} with this config for all")


def has_truth(cfg: CfgNode, name: str) -> bool:
    """Whether a data set that has passed its checks has ground truth for evaluation.

    Args:
        cfg: as for :func:`check_dataset`.
        name: name of the data set; True is assumed for one with its own loader.
    """
    source = find_source(name)
    if isinstance(source, CityscapesSource):
        return source.has_truth()
    return not isinstance(source, CocoSource) or examine_coco(cfg, name).objects > 0


class Remarks(NamedTuple):
    """Lines for the log of a run.

    Attributes:
        warnings: what changes the results of training or evaluation.
        notes: what training leaves out, one line per data set.
    """

    warnings: list[str]
    notes: list[str]


def check_datasets(
    cfg: CfgNode, names: Sequence[str], trained: Sequence[str] | None = None
) -> Remarks:
    """Checks the data sets of a run; opens as many images as DATASETS.CHECK_IMAGES says.

    Args:
        cfg: as for :func:`check_dataset`.
        names: names of the data sets.
        trained: as for :func:`contnet.data.validation.classes.check_classes`.

    Raises:
        UserError: with the first error.
    """
    examined = {name: examine_dataset(cfg, name) for name in names}
    found = {name: findings for name, (findings, _) in examined.items()}
    check_classes(cfg, found, trained)
    _raise_errors(found)
    which = cfg.DATASETS.CHECK_IMAGES
    for name, (findings, look) in examined.items():
        # TEST.SKIP_UNREADABLE leaves damaged images out of a data set that is only evaluated.
        skips = cfg.TEST.SKIP_UNREADABLE and name not in cfg.DATASETS.TRAIN
        if look and which != "none" and not skips:
            items = look.find_all() if which == "all" else look.first
            look_at_images(look.inspect, items, name, findings, available_cpus())
    _raise_errors(found)
    return Remarks(
        [
            f"data set {name}: {line}"
            for name in found
            for severity in (SUSPECT, WARNING)
            for line in found[name].lines(severity)
        ],
        [f"data set {name}: {found[name].left_out}" for name in found if found[name].left_out],
    )
