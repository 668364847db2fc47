"""What can be wrong with image files: damaged, too large, too dark, turned, thin, of another size.

The doctor opens all images of a data set by this, and a training the first ones.
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

FIRST = 8  # images of each set that a training opens before it starts
_MODES = {"L": "grey", "P": "palette", "CMYK": "CMYK"}
_EXIF_TURNED = range(5, 9)  # width and height change places
# Of 16 bits, 12 are often all that a camera or scanner fills.
_DARK = 4096


@dataclass(frozen=True)
class ImageRules:
    """What a run asks of images.

    Attributes:
        max_pixels: INPUT.MAX_PIXELS.
        longest: times as long as wide that an image may be before it loses pixels.
        thin: what becomes of longer ones.
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
    """An image as an annotation file has it."""

    path: str
    width: object
    height: object


class Look(NamedTuple):
    """What opens the images of a data set.

    Attributes:
        inspect: decodes the image of an item; what it finds.
        first: items of a few images.
        find_all: the items of all images.
    """

    inspect: Callable[[object], list[Finding]]
    first: Sequence
    find_all: Callable[[], Sequence]


# --- one image -----------------------------------------------------------------------------------


def _describe(record: dict, decoded: Decoded, rules: ImageRules) -> list[Finding]:
    """What may surprise of an image that can be read."""
    found, name = [], sample_name(record)
    if decoded.peak is not None:
        found.append(Finding(FACT, "of 16 bits, of which the upper 8 are used"))
        if 0 < decoded.peak < _DARK:
            what = (
                f"images of 16 bits with all values below {_DARK}, which become almost black: "
                "scale them to 0 to 65535, or save them with 8 bits"
            )
            found.append(Finding(WARNING, what, f"{name} (largest value {decoded.peak})"))
    elif decoded.mode != "RGB":
        found.append(Finding(FACT, f"stored as {_MODES.get(decoded.mode, decoded.mode)}"))
    sides = decoded.image.size
    if max(sides) > rules.longest * min(sides):
        what = f"images more than {rules.longest} times as long as wide, or as high: {rules.thin}"
        found.append(Finding(NOTE, what, f"{name} ({sides[0]}x{sides[1]})"))
    if has_more_frames(record):
        what = "images of several frames or pages, of which the first is used"
        found.append(Finding(NOTE, what, name))
    return found


def inspect_pixels(record: dict, rules: ImageRules) -> tuple[Decoded | None, list[Finding]]:
    """Decodes an image as training does, unless it cannot be; what is found in any data set."""
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
    """Decodes an image to be classified; what is wrong with it."""
    decoded, found = inspect_pixels(record, rules)
    if decoded and decoded.orientation != 1:
        found.append(Finding(FACT, "turned by EXIF"))
    return found


def inspect_listed(image: ListedImage, rules: ImageRules) -> list[Finding]:
    """Decodes an image of an annotation file; what is wrong with it."""
    decoded, found = inspect_pixels({"file_name": image.path}, rules)
    if decoded is None:
        return found
    width, height = decoded.image.size
    stated = as_whole(image.width), as_whole(image.height)
    if None in stated:  # which is told of the file
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
    """Those images of an annotation file whose files are there; what is missing is told elsewhere.

    Args:
        root: the image folder.
        images: as the annotation file has them.
    """
    named = [image for image in images if isinstance(image.get("file_name"), str)]
    paths = [os.path.join(root, image["file_name"]) for image in named]
    return [
        ListedImage(path, image.get("width"), image.get("height"))
        for path, image in zip(paths, named, strict=True)
        if os.path.isfile(path)
    ]


def find_listed(name: str) -> list[ListedImage]:
    """The images of a data set of COCO's form whose files are there."""
    metadata = MetadataCatalog.get(name)
    return listed(metadata.image_root, read_instances(metadata.json_file)["images"])


def _in_parallel(
    function: Callable[[object], list[Finding]], items: Sequence, name: str, workers: int
) -> Iterator[list[Finding]]:
    """Results in the order of the items, with a progress bar where there is a terminal."""
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
    """Opens images; adds what is found.

    Args:
        inspect: of a :class:`Look`.
        items: of it.
        name: of the data set.
        findings: of the data set.
        workers: processes, where there are more than a few images.
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
