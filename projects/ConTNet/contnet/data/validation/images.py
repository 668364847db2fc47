"""Checks image files: damaged, too large, too dark, rotated, thin, or of another size.

The doctor opens all images of a data set with these checks, and a training run the first ones.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from tqdm import tqdm

from contnet.data.datasets.coco import as_whole, read_instances
from contnet.data.datasets.shards import sample_name
from contnet.data.findings import ERROR, FACT, NOTE, WARNING, Finding, Findings
from contnet.data.pipeline.images import Decoded, decode, decode_error, has_more_frames
from contnet.data.pipeline.transforms import LONGEST
from contnet.utils.errors import UserError
from contnet.utils.pools import process_pool
from contnet.utils.text import plural

__all__ = [
    "FIRST",
    "ImageRules",
    "ListedImage",
    "Look",
    "find_listed",
    "inspect_image",
    "inspect_listed",
    "inspect_pixels",
    "listed",
    "look_at_images",
]

FIRST = 8  # images of each data set that a training run opens before it starts
_MODES = {"L": "grey", "P": "palette", "CMYK": "CMYK"}
_EXIF_TURNED = range(5, 9)  # width and height are swapped
# Cameras and scanners often use only 12 of 16 bits.
_DARK = 4096


@dataclass(frozen=True)
class ImageRules:
    """What a run requires of images.

    Attributes:
        max_pixels: INPUT.MAX_PIXELS.
        longest: largest ratio of an image's sides at which it loses no pixels.
        thin: what happens to longer images.
    """

    max_pixels: int
    longest: float
    thin: str

    @classmethod
    def from_config(cls, cfg: CfgNode) -> ImageRules:
        if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
            return cls(cfg.INPUT.MAX_PIXELS, LONGEST, "crops show only a small part of them")
        longest = min(cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST)
        return cls(cfg.INPUT.MAX_PIXELS, longest, "they are resized to a single row or column")


class ListedImage(NamedTuple):
    """An image as an annotation file describes it."""

    path: str
    width: object
    height: object


class Look(NamedTuple):
    """How the images of a data set are opened.

    Attributes:
        inspect: decodes the image of an item and returns findings.
        first: items of a few images.
        find_all: returns the items of all images.
    """

    inspect: Callable[[object], list[Finding]]
    first: Sequence
    find_all: Callable[[], Sequence]


# --- one image -----------------------------------------------------------------------------------


def _describe(record: dict, decoded: Decoded, rules: ImageRules) -> list[Finding]:
    """Returns what may surprise about an image that can be read."""
    found, name = [], sample_name(record)
    if decoded.peak is not None:
        found.append(Finding(FACT, "with 16 bits, of which the upper 8 are used"))
        if 0 < decoded.peak < _DARK:
            what = (
                f"16-bit images with all values below {_DARK}, which become almost black: "
                "scale them to 0 to 65535, or save them with 8 bits"
            )
            found.append(Finding(WARNING, what, f"{name} (largest value {decoded.peak})"))
    elif decoded.mode != "RGB":
        found.append(Finding(FACT, f"stored as {_MODES.get(decoded.mode, decoded.mode)}"))
    sides = decoded.image.size
    if max(sides) > rules.longest * min(sides):
        what = f"images with one side more than {rules.longest} times the other: {rules.thin}"
        found.append(Finding(NOTE, what, f"{name} ({sides[0]}x{sides[1]})"))
    if has_more_frames(record):
        what = "images with several frames or pages, of which the first is used"
        found.append(Finding(NOTE, what, name))
    return found


def inspect_pixels(record: dict, rules: ImageRules) -> tuple[Decoded | None, list[Finding]]:
    """Decodes an image as training does; returns it, or None if it is unreadable, and findings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            decoded = decode(record, rules.max_pixels)
            found = _describe(record, decoded, rules)
        except UserError as error:
            place = f"{sample_name(record)} ({decode_error(error.__cause__)})"
            return None, [Finding(ERROR, "images that cannot be read", place)]
    what = "images that Pillow reads with a warning"
    messages = dict.fromkeys(" ".join(str(each.message).split()) for each in said)
    places = [f"{sample_name(record)} ({message})" for message in messages]
    return decoded, [*found, *(Finding(NOTE, what, place) for place in places)]


def inspect_image(record: dict, rules: ImageRules) -> list[Finding]:
    """Decodes an image for classification and returns findings."""
    decoded, found = inspect_pixels(record, rules)
    if decoded and decoded.orientation != 1:
        found.append(Finding(FACT, "turned by EXIF"))
    return found


def inspect_listed(image: ListedImage, rules: ImageRules) -> list[Finding]:
    """Decodes an image of an annotation file and returns findings."""
    decoded, found = inspect_pixels({"file_name": image.path}, rules)
    if decoded is None:
        return found
    width, height = decoded.image.size
    stated = as_whole(image.width), as_whole(image.height)
    if None in stated:  # reported for the annotation file
        return found
    sizes = f"{image.path} ({width}x{height}, annotations {image.width}x{image.height})"
    if (width, height) != stated:
        what = "images whose size differs from that in the annotations"
        turned = decoded.orientation in _EXIF_TURNED
        if turned and (height, width) == stated:
            what = (
                "images that are rotated by their EXIF orientation when read, but annotated "
                "without it: save the images without EXIF orientation"
            )
        return [*found, Finding(ERROR, what, sizes)]
    if decoded.orientation != 1:
        what = (
            "images that are rotated by their EXIF orientation when read: annotations must be for "
            "the rotated images"
        )
        found.append(Finding(NOTE, what, image.path))
    return found


# --- a data set ----------------------------------------------------------------------------------


def listed(root: str, images: Sequence[dict]) -> list[ListedImage]:
    """Returns the images of an annotation file whose files exist; others are reported elsewhere.

    Args:
        root: the image folder.
        images: the images in the annotation file.
    """
    named = [image for image in images if isinstance(image.get("file_name"), str)]
    paths = [os.path.join(root, image["file_name"]) for image in named]
    return [
        ListedImage(path, image.get("width"), image.get("height"))
        for path, image in zip(paths, named, strict=True)
        if os.path.isfile(path)
    ]


def find_listed(name: str) -> list[ListedImage]:
    """Returns the images of a data set in COCO format whose files exist."""
    metadata = MetadataCatalog.get(name)
    return listed(metadata.image_root, read_instances(metadata.json_file)["images"])


def _in_parallel(
    function: Callable[[object], list[Finding]], items: Sequence, name: str, workers: int
) -> Iterator[list[Finding]]:
    """Yields results in the order of the items, with a progress bar in a terminal."""
    with process_pool(workers) as pool:
        chunk = max(1, min(128, len(items) // (4 * workers)))
        results = pool.map(function, items, chunksize=chunk)
        yield from tqdm(results, desc=name, total=len(items), unit="image", disable=None)


def look_at_images(
    inspect: Callable[[object], list[Finding]],
    items: Sequence,
    name: str,
    findings: Findings,
    workers: int,
) -> None:
    """Opens images and adds what is found.

    Args:
        inspect: attribute of a :class:`Look`.
        items: items of that :class:`Look`.
        name: name of the data set.
        findings: findings of the data set.
        workers: number of processes, used for more than a few images.
    """
    facts = Counter()
    few = len(items) <= FIRST
    for found in map(inspect, items) if few else _in_parallel(inspect, items, name, workers):
        for finding in found:
            if finding.severity == FACT:
                facts[finding.kind] += 1
            else:
                findings.add(*finding)
    findings.fact(f"{plural(len(items), 'image')} opened")
    if facts:
        findings.fact(
            "of these " + ", ".join(f"{count} {what}" for what, count in sorted(facts.items()))
        )
