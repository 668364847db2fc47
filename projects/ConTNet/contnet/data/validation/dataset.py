"""Checks data sets as a config uses them, without opening images.

A training makes these checks before it starts; tools/doctor.py makes them too, and decodes the
images.
"""

from __future__ import annotations

import difflib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from contnet.data.datasets.cityscapes import CityscapesSource
from contnet.data.datasets.classes import IMAGE_LABELS
from contnet.data.datasets.classification import ClassificationSource, read_set
from contnet.data.datasets.coco import CocoSource
from contnet.data.datasets.register import find_source, is_registered
from contnet.data.findings import ERROR, WARNING, Findings
from contnet.data.validation.classes import check_classes
from contnet.data.validation.examine import examine_cityscapes, examine_coco
from contnet.utils.errors import UserError
from contnet.utils.files import file_names
from contnet.utils.text import plural

__all__ = ["OFFICIAL_COUNTS", "check_dataset", "check_datasets"]

_DOCTOR = "python tools/doctor.py"
# By built-in name: who publishes it, and its images and objects, or images and classes.
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
    """Where the layout of a built-in data set is told."""
    pages = {CityscapesSource: "docs/cityscapes.md", ClassificationSource: "docs/imagenet.md"}
    return pages.get(type(find_source(name)), "docs/data.md")


def _origin(cfg: CfgNode, name: str) -> str:
    """Where the paths of a data set come from."""
    if is_registered(cfg, name):
        return "mend its path in DATASETS.REGISTER"
    value = os.environ.get("DETECTRON2_DATASETS")
    if value is not None:
        return f"DETECTRON2_DATASETS is {value!r}, {_page(name)} shows what belongs there"
    return (
        f"DETECTRON2_DATASETS is not set: data sets are looked for in {Path('datasets').resolve()}"
    )


def _are_there(cfg: CfgNode, name: str, findings: Findings) -> bool:
    """Whether a data set is registered and its files and folders exist."""
    if name not in DatasetCatalog.list():
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        findings.error(f"it is not registered, give your own in DATASETS.REGISTER{hint}")
        return False
    metadata = MetadataCatalog.get(name)
    whole = True
    for fact, what in _FOLDERS.items():
        path = metadata.get(fact)
        if not path:
            continue
        findings.facts.append(f"{what} {Path(path).resolve()}")
        if not os.path.exists(path):
            whole = False
            findings.error(
                f"the {what} {Path(path).resolve()} does not exist ({_origin(cfg, name)})"
            )
    return whole


def _check_files(cfg: CfgNode, name: str, images: Sequence[str], findings: Findings) -> None:
    by_folder = defaultdict(list)
    root = find_source(name).image_root
    for image in images:
        folder, file = os.path.split(os.path.join(root, image))
        by_folder[folder].append(file)
    for folder, files in by_folder.items():
        present = file_names(folder)
        for file in files:
            if file not in present:
                findings.error(
                    f"images that are missing ({_origin(cfg, name)})", os.path.join(folder, file)
                )


def _compare_count(name: str, count: tuple[int, int], what: str, findings: Findings) -> None:
    """Says whether a built-in set is whole: its images, and how many of what else."""
    if name not in OFFICIAL_COUNTS:
        return
    who, official = OFFICIAL_COUNTS[name]
    if count == official:
        findings.facts.append(f"as many as {who} itself has")
        return
    findings.note(
        f"{plural(count[0], 'image')} and {plural(count[1], what)}, {who} itself has "
        f"{official[0]} and {official[1]}"
    )


def _check_coco(cfg: CfgNode, name: str, findings: Findings) -> None:
    metadata = MetadataCatalog.get(name)
    try:
        found, images, objects = examine_coco(cfg, name)
    except UserError as error:
        findings.error(str(error))
        return
    findings.merge(found)
    _check_files(cfg, name, images, findings)
    # Only built-in names have their classes before the file is loaded.
    expected = metadata.get("thing_classes")
    if expected and list(expected) != findings.classes["objects"]:
        findings.error(
            f"its file has other categories than {name}, which stands for {len(expected)} classes "
            f"({', '.join(expected[:3])}, ...): give a data set of your own another name in "
            "DATASETS.REGISTER"
        )
    _compare_count(name, (len(images), objects), "object", findings)


def _check_cityscapes(cfg: CfgNode, name: str, findings: Findings) -> None:
    metadata = MetadataCatalog.get(name)
    kind = metadata.evaluator_type
    if kind == "cityscapes_sem_seg":
        findings.classes["label maps"] = list(metadata.stuff_classes)
    else:
        findings.classes["objects"] = list(metadata.thing_classes)
    findings.merge(examine_cityscapes(cfg, name))


def _check_classification(cfg: CfgNode, name: str, findings: Findings) -> None:
    content = read_set(find_source(name), findings)
    if not content.records:
        return
    number = content.number_of_classes
    findings.classes[IMAGE_LABELS] = content.classes or [f"class {i}" for i in range(number)]
    findings.named = content.classes is not None
    _compare_count(name, (len(content.records), number), "class", findings)
    if name not in cfg.DATASETS.TRAIN or cfg.MODEL.META_ARCHITECTURE != "ImageClassifier":
        return
    wanted = {"ASPECT_RATIO_GROUPING": False, "SAMPLER_TRAIN": "TrainingSampler"}
    for key, value in wanted.items():
        if cfg.DATALOADER[key] != value:
            findings.error(
                f"DATALOADER.{key} is {cfg.DATALOADER[key]}, labels of images need {value}"
            )


# By the kind of a data set: adds what is found of it.
_CHECKS: dict[type, Callable[[CfgNode, str, Findings], None]] = {
    CocoSource: _check_coco,
    CityscapesSource: _check_cityscapes,
    ClassificationSource: _check_classification,
}


def check_dataset(cfg: CfgNode, name: str) -> Findings:
    """What can be told of a data set without opening its images.

    Args:
        cfg: DATASETS, DATALOADER, MODEL and INPUT.MASK_FORMAT are read.
        name: of the data set, registered or not.
    """
    findings = Findings()
    if not _are_there(cfg, name, findings):
        return findings
    kind = type(find_source(name))
    if kind in _CHECKS:
        _CHECKS[kind](cfg, name, findings)
    else:
        findings.note("it has a loader of its own, so that nothing of it is checked")
    return findings


def check_datasets(
    cfg: CfgNode, names: Sequence[str], trained: Sequence[str] | None = None
) -> list[str]:
    """Makes the checks of a run's data sets that need no image.

    Args:
        cfg: as for :func:`check_dataset`.
        names: of the data sets.
        trained: as for :func:`contnet.data.validation.classes.check_classes`.

    Returns:
        The warnings, a line each.

    Raises:
        UserError: with the first error.
    """
    found = {name: check_dataset(cfg, name) for name in names}
    check_classes(cfg, found, trained)
    errors = [(name, line) for name in found for line in found[name].lines(ERROR)]
    if errors:
        name, line = errors[0]
        more = f" (and {len(errors) - 1} more kinds of errors)" if len(errors) > 1 else ""
        raise UserError(f"data set {name}: {line}{more}; {_DOCTOR} with this config tells all")
    return [f"data set {name}: {line}" for name in found for line in found[name].lines(WARNING)]
