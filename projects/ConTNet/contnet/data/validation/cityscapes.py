"""Checks a data set in Cityscapes' layout.

:func:`check_layout` checks folders and polygon files, :func:`inspect_images` the pixels of one
image and its label files.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
from cityscapesscripts.helpers.labels import id2label, name2label

from contnet.data.datasets.cityscapes import GT_FILES, IMAGE_SUFFIX, Scene, find_scenes
from contnet.data.findings import ERROR, NOTE, Finding, Findings
from contnet.data.pipeline.images import decode_error, read_labels, read_stored
from contnet.data.validation.coco import is_size
from contnet.data.validation.geometry import is_far
from contnet.data.validation.images import ImageRules, inspect_pixels
from contnet.data.validation.left_out import CROWD, LeftOut
from contnet.data.validation.masks import are_numbers
from contnet.utils.errors import UserError
from contnet.utils.files import describe_kind, file_names, open_regular
from contnet.utils.text import plural

__all__ = ["check_layout", "inspect_images"]

_COUNTS = {"train": 2975, "val": 500, "test": 1525}
_SIZE = (2048, 1024)
_PREPARE = "run python tools/prepare_cityscapes.py"
_COPY = "copy gtFine again"
# tools/prepare_cityscapes.py keeps existing files.
_REMAKE = f"remove them, then {_PREPARE}"

_LABELS = {number for number in id2label if number >= 0}
_TRAIN_IDS = {label.trainId for label in id2label.values() if 0 <= label.trainId < 255} | {255}
# Classes that detectors learn.
_THINGS = {x.name for x in id2label.values() if x.hasInstances and not x.ignoreInEval}
_WITH_INSTANCES = {number for number in _LABELS if id2label[number].hasInstances}


def _listing(folder: str) -> set[Path]:
    cities = [city for city in Path(folder).iterdir() if city.is_dir()]
    return {city / name for city in cities for name in file_names(city)}


def check_layout(
    image_dir: str,
    gt_dir: str,
    kind: str,
    findings: Findings,
    trained: bool = False,
    truth: bool = True,
    filtered: bool = True,
) -> None:
    """Checks that every image has its files and that the polygons can be used.

    Args:
        image_dir: ``leftImg8bit/SPLIT``, which exists.
        gt_dir: ``gtFine/SPLIT``, which exists if ``truth``.
        kind: a key of ``GT_FILES``.
        findings: receives what is found.
        trained: whether the split is in DATASETS.TRAIN.
        truth: whether its objects are published; otherwise label files are not checked.
        filtered: DATALOADER.FILTER_EMPTY_ANNOTATIONS.
    """
    scenes = find_scenes(image_dir, gt_dir, kind)
    findings.fact(plural(len(scenes), "image"))
    if not scenes:
        findings.error(f"there are no images CITY/NAME{IMAGE_SUFFIX} in {image_dir}")
        return
    official = _COUNTS.get(Path(image_dir).name)
    if official == len(scenes):
        findings.fact("as many as Cityscapes has")
    elif official:
        findings.note(f"{len(scenes)} images, Cityscapes has {official}")
    _check_strays(image_dir, findings)
    if not truth:
        tell = findings.error if trained else findings.note
        tell("all its labels are ignored, so nothing can be learned or measured on it")
        return
    present = _listing(gt_dir)
    paired, labels = set(), []
    for scene in scenes:
        paired.update(scene.labels.values())
        for end, path in scene.labels.items():
            cure = _PREPARE if end.endswith(".png") else _COPY
            if path not in present:
                findings.error(f"images without {end}: {cure}", path.name)
        if scene.labels["polygons.json"] in present:
            labels.append(_check_polygons(scene, findings))
    if kind == "cityscapes_instance":
        _check_objects(labels, trained, filtered, findings)
    for path in sorted(present - paired):
        if path.name.endswith(tuple(f"_gtFine_{end}" for end in GT_FILES[kind])):
            findings.note("label files without an image", path.name)


def _check_strays(image_dir: str, findings: Findings) -> None:
    """Checks for files that Detectron2 would treat as images."""
    for city in sorted(Path(image_dir).glob("*")):
        files = file_names(city)
        for path in sorted(city.iterdir()) if city.is_dir() else [city]:
            if path.name.startswith(".") or not path.name.endswith(IMAGE_SUFFIX):
                findings.error(
                    f"files that are not images *{IMAGE_SUFFIX}: move them away", str(path)
                )
            elif path.name not in files:
                findings.error(
                    "missing images, or broken links",
                    f"{path} ({describe_kind(path)})",
                )


def _read_polygons(file: Path) -> dict | None:
    try:
        with open_regular(file, "r", encoding="utf-8") as text:
            content = json.load(text)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("objects"), list):
        return None
    if not all(isinstance(thing, dict) for thing in content["objects"]):
        return None
    return content


def _check_polygons(scene: Scene, findings: Findings) -> list[str]:
    """Checks the polygons of an image; returns their labels."""
    file = scene.labels["polygons.json"]
    content = _read_polygons(file)
    if content is None:
        findings.error(f"polygon files that cannot be read: {_COPY}", file.name)
        return []
    size = content.get("imgWidth"), content.get("imgHeight")
    if not is_size(*size):
        findings.error("polygon files without imgWidth and imgHeight", file.name)
        return []
    things = [thing for thing in content["objects"] if "deleted" not in thing]
    for thing in things:
        _check_object(thing, size, file.name, findings)
    return [str(thing.get("label")) for thing in things]


def _check_objects(
    labels: list[list[str]], trained: bool, filtered: bool, findings: Findings
) -> None:
    """Counts the objects of classes with instances, from the labels of each image."""
    counts = Counter(label for of_image in labels for label in of_image if label in _THINGS)
    findings.fact(plural(counts.total(), "object"))
    if trained:
        _count_left_out(labels, filtered, findings)
    if trained and not counts:
        findings.error("it has no object to train on")
    if empty := sum(_THINGS.isdisjoint(of_image) for of_image in labels):
        findings.note(f"{empty} of {len(labels)} images have no objects")
    for label in sorted(_THINGS - counts.keys()):
        findings.note("classes without objects", label)


def _count_left_out(labels: list[list[str]], filtered: bool, findings: Findings) -> None:
    """Counts groups, which are Cityscapes' crowds, and images without objects."""
    left_out = LeftOut()
    for image, of_image in enumerate(labels):
        for label in of_image:
            if label.removesuffix("group") in _THINGS:
                left_out.count(image, "" if label in _THINGS else CROWD)
    left_out.tell(len(labels), filtered, findings)


def _check_object(thing: dict, size: tuple[int, int], where: str, findings: Findings) -> None:
    name = str(thing.get("label"))
    if name not in name2label and name.removesuffix("group") not in name2label:
        findings.error("objects of classes that are not in Cityscapes", f"{where} {name}")
    polygon = thing.get("polygon")
    if not _is_polygon(polygon):
        findings.error("polygons that are not lists of 3 or more [x, y]", f"{where} {name}")
        return
    xs, ys = zip(*polygon, strict=True)
    if is_far(min(xs), max(xs), size[0]) or is_far(min(ys), max(ys), size[1]):
        findings.error("polygons that reach far outside their image", f"{where} {name}")


def _is_polygon(polygon: object) -> bool:
    try:
        points = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    return (
        isinstance(polygon, list)
        and points.ndim == 2
        and len(points) >= 3
        and points.shape[1] == 2
        and are_numbers(chain.from_iterable(polygon))
    )


def _wrong_values(end: str, values: np.ndarray) -> list[int]:
    """Returns values that are not valid in a kind of label file."""
    if end == "labelTrainIds.png":
        return [value for value in values.tolist() if value not in _TRAIN_IDS]
    if end == "labelIds.png":
        return [value for value in values.tolist() if value not in _LABELS]
    return [
        value
        for value in values.tolist()
        if (value if value < 1000 else value // 1000)
        not in (_LABELS if value < 1000 else _WITH_INSTANCES)
    ]


def _inspect_labels(end: str, path: Path, size: tuple[int, int]) -> list[Finding]:
    try:
        labels = read_stored(str(path))
        # As training reads them.
        grey = read_labels(str(path)) if end == "labelTrainIds.png" else labels
    except UserError as error:
        place = f"{path} ({decode_error(error.__cause__)})"
        return [Finding(ERROR, f"{end} files that cannot be read: {_REMAKE}", place)]
    if labels.ndim != 2:
        return [Finding(ERROR, f"{end} files in colour: {_REMAKE}", str(path))]
    found = []
    if not np.array_equal(labels, grey):
        what = f"{end} files that are not grey with 8 bits (a palette?): {_REMAKE}"
        found.append(Finding(ERROR, what, str(path)))
    if labels.shape[::-1] != size:
        sizes = f"{path} ({labels.shape[1]}x{labels.shape[0]}, image {size[0]}x{size[1]})"
        found.append(Finding(ERROR, f"{end} files whose size differs from their image's", sizes))
    if wrong := _wrong_values(end, np.unique(labels)):
        values = ", ".join(map(str, wrong[:3]))
        what = f"{end} files with invalid values: {_REMAKE}"
        found.append(Finding(ERROR, what, f"{path} ({values})"))
    return found


def inspect_images(scene: Scene, rules: ImageRules) -> list[Finding]:
    """Decodes an image and its label files, if they exist, and returns findings."""
    decoded, found = inspect_pixels({"file_name": str(scene.image)}, rules)
    if decoded is None:
        return found
    width, height = decoded.image.size
    if (width, height) != _SIZE:
        what = f"images whose size is not Cityscapes' {_SIZE[0]}x{_SIZE[1]}"
        found.append(Finding(NOTE, what, f"{scene.image.name} ({width}x{height})"))
    content = _read_polygons(scene.labels["polygons.json"])
    if content is not None:
        given = content.get("imgWidth"), content.get("imgHeight")
        if given != (width, height):
            sizes = f"{scene.image.name} ({width}x{height}, polygons {given[0]}x{given[1]})"
            found.append(
                Finding(ERROR, "images whose size differs from that in their polygon file", sizes)
            )
    for end, path in scene.labels.items():
        if end.endswith(".png") and path.exists():
            found += _inspect_labels(end, path, (width, height))
    return found
