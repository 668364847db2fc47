"""Reads Pascal VOC XML files, as written by labelImg, CVAT, Roboflow and others.

They are parsed with the standard library: globox and supervision stop at the first damaged file
and drop polygons and flags (the tests compare with globox what it does read).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from contnet.data.conversion.common import (
    ClassNames,
    Conversion,
    ImageFolder,
    Points,
    bounding_box,
    comparable,
    find_files,
    read_text,
    turn,
)
from contnet.utils.errors import UserError
from contnet.utils.files import open_regular
from contnet.utils.text import first_names

__all__ = ["convert_voc"]

_IMAGE_FOLDERS = ("JPEGImages", "images")
_ENCODING = re.compile(rb"\s*<\?xml[^>]*\sencoding\s*=\s*[\"']([\w.:-]+)")
_PIXELS = ("xmin", "ymin", "xmax", "ymax")


def _find_images(folder: Path) -> ImageFolder:
    """Returns the images for a folder of XML files, or for the parent of such a folder."""
    places = [above / name for above in (folder, folder.parent) for name in _IMAGE_FOLDERS]
    for place in (*places, folder):
        if place.is_dir() and (images := ImageFolder(place)).files:
            return images
    raise UserError(
        f"there are no images in {folder} or next to it: give their folder with --images"
    )


class _PlainTree(ElementTree.TreeBuilder):
    """Rejects a DTD, whose entities may grow without limit; VOC files have none."""

    def doctype(self, *_: object) -> None:
        raise ElementTree.ParseError("it has a DOCTYPE")


def _parse_xml(data: bytes | str) -> ElementTree.Element:
    return ElementTree.fromstring(data, ElementTree.XMLParser(target=_PlainTree()))


def _parse(file: Path) -> ElementTree.Element | None:
    try:
        with open_regular(file) as stream:
            data = stream.read()
        try:
            root = _parse_xml(data)
        except ValueError:  # expat does not support multi-byte encodings such as GBK
            stated = _ENCODING.match(data)
            root = _parse_xml(data.decode(stated[1].decode())) if stated else None
    except (OSError, ElementTree.ParseError, ValueError, LookupError):
        return None
    return root if root is not None and root.tag == "annotation" else None


def _text(node: ElementTree.Element, path: str) -> str:
    return (node.findtext(path) or "").strip()


def _numbers(node: ElementTree.Element, names: Iterable[str]) -> list[float]:
    """Returns the values of some children; ValueError if one is missing or not a finite number."""
    texts = {child.tag: child.text for child in reversed(node)}  # the first of several
    values = [float((texts.get(name) or "").strip()) for name in names]
    if not all(map(math.isfinite, values)):
        raise ValueError("not finite")
    return values


def _points(item: ElementTree.Element) -> tuple[Points, bool]:
    """Returns the corners of an object's box, or its polygon, and whether it is a polygon."""
    if (polygon := item.find("polygon")) is not None and polygon.find("x3") is not None:
        count = sum(re.fullmatch(r"x\d+", child.tag) is not None for child in polygon)
        xs = _numbers(polygon, (f"x{i}" for i in range(1, count + 1)))
        ys = _numbers(polygon, (f"y{i}" for i in range(1, count + 1)))
        return list(zip(xs, ys, strict=True)), True
    left, top, right, bottom = _numbers(item.find("bndbox"), _PIXELS)
    return [(left, top), (right, bottom)], False


def _counts_from_one(root: ElementTree.Element, first_pixel: int | None) -> bool:
    """Whether pixels count from 1 and a box includes both corners, as in VOC's own files."""
    if first_pixel is None:
        return _text(root, "source/annotation").upper().startswith("PASCAL VOC")
    return first_pixel == 1


def _split_lists(folder: Path) -> dict[str, Path]:
    """Returns the lists in ImageSets by name; those in Main take precedence."""
    lists = {}
    for above in (folder, folder.parent):
        for kind in ("Main", "*"):
            for file in sorted(above.glob(f"ImageSets/{kind}/*.txt")):
                lists.setdefault(file.stem, file)
    return lists


def _listed_names(file: Path) -> list[str]:
    """Returns the names in a list; lists of one class have -1, 0 or 1 after each name."""
    lines = [re.sub(r"\s+-?[01]$", "", line.strip()) for line in read_text(file).splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def _select(folder: Path, files: list[Path], split: str, conversion: Conversion) -> list[Path]:
    """Returns the XML files of a split: a list in ImageSets, another text file, or a folder."""
    lists = _split_lists(folder)
    given = Path(split)
    if split in lists or (given.suffix == ".txt" and given.is_file()):
        by_stem = {comparable(file.stem): file for file in files}
        chosen = []
        for name in _listed_names(lists.get(split, given)):
            stem = Path(comparable(name)).name
            found = by_stem.get(stem) or by_stem.get(Path(stem).stem)
            if found:
                chosen.append(found)
            else:
                conversion.read["images"] += 1
                conversion.leave_image(f"listed in {split} without an XML file", name)
        return chosen
    if (folder / split).is_dir():
        return [file for file in files if file.is_relative_to(folder / split)]
    known = sorted(lists) or sorted(path.name for path in folder.iterdir() if path.is_dir())
    there = f"there are {first_names(known)}" if known else "there are none"
    raise UserError(f"{folder} has no split {split}: {there} (ImageSets/Main/*.txt, or folders)")


@dataclass
class _Reader:
    """Adds the files of a folder to a conversion."""

    folder: Path
    images: ImageFolder
    conversion: Conversion
    first_pixel: int | None
    skip_difficult: bool
    taken: dict[Path, str] = field(default_factory=dict)

    def add_file(self, file: Path, root: ElementTree.Element | None) -> None:
        """Adds an image with its objects, or leaves it out."""
        place = file.relative_to(self.folder).as_posix()
        objects = [] if root is None else root.findall("object")
        self.conversion.read.update(images=1, objects=len(objects))
        if root is None:
            self.conversion.leave_image("their file is not VOC XML", place)
            return
        image = self._find_image(file, root)
        if isinstance(image, str):
            self.conversion.leave_image(image, place, len(objects))
            return
        if measured := self.conversion.measure(image, len(objects)):
            *size, orientation = measured
            orientation = self._frame(root, tuple(size), orientation, place)
            if orientation is None:
                why = "their XML has another image size"
                self.conversion.leave_image(
                    why, f"{place} (image {size[0]}x{size[1]})", len(objects)
                )
                return
            self.taken[image] = place
            self.conversion.add_image(self.images.name(image), tuple(size))
            for number, item in enumerate(objects, 1):
                one_based = _counts_from_one(root, self.first_pixel)
                self._add_object(item, f"{place}, object {number}", orientation, one_based)

    def _find_image(self, file: Path, root: ElementTree.Element) -> Path | str:
        """Returns the image with the file's own or stated name; otherwise why there is none."""
        own = self.images.find(file.relative_to(self.folder).with_suffix("").as_posix())
        named = self.images.find(_text(root, "filename"))
        found = [path for path in own if path in named] or own or named
        if len(found) != 1:
            return "several have the same name" if found else f"not found in {self.images.root}"
        if found[0] in self.taken:
            return f"already described by {self.taken[found[0]]}"
        return found[0]

    def _frame(
        self, root: ElementTree.Element, size: tuple[int, int], orientation: int, place: str
    ) -> int | None:
        """Returns the orientation by which to turn boxes; None if they are for another size."""
        try:
            stated = tuple(map(round, _numbers(root.find("size"), ("width", "height"))))
        except (TypeError, ValueError):  # TypeError: there is no size
            stated = (0, 0)
        if stated == (0, 0):
            self.conversion.findings.note("XML files without the size of the image", place)
        if stated in ((0, 0), size):
            return 1
        if orientation >= 5 and stated == size[::-1]:
            what = "images rotated by EXIF but labelled as stored: their boxes are rotated, too"
            self.conversion.findings.note(what, place)
            return orientation
        return None

    def _add_object(
        self, item: ElementTree.Element, place: str, orientation: int, one_based: bool
    ) -> None:
        conversion = self.conversion
        try:
            points, polygon = _points(item)
        except (TypeError, ValueError):  # TypeError: there is no box
            conversion.leave_object("without a box of four numbers", place)
            return
        fields = {flag: 1 for flag in ("difficult", "truncated") if _text(item, flag) == "1"}
        if "difficult" in fields:
            if self.skip_difficult:
                conversion.leave_object("marked difficult", place, wanted=True)
                return
            conversion.findings.note("objects marked difficult, kept", place)
        if not polygon and points != bounding_box(points):
            conversion.findings.note("boxes with swapped corners, corrected", place)
            points = bounding_box(points)
        if one_based:
            first, *others = [(x - 1, y - 1) for x, y in points]
            points = [first, *(others if polygon else points[1:])]
        size = conversion.images[-1]["width"], conversion.images[-1]["height"]
        points = turn(points, orientation, size)
        conversion.add_object(_text(item, "name"), points, place, polygon=polygon, **fields)


def convert_voc(
    folder: Path,
    images_folder: Path | None = None,
    *,
    split: str = "",
    names: list[str] | None = None,
    first_pixel: int | None = None,
    skip_difficult: bool = False,
) -> tuple[Conversion, Path]:
    """Reads a data set of XML files.

    Args:
        folder: folder with the XML files, also in subfolders, or the parent of ``Annotations``.
        images_folder: folder with the images; by default ``JPEGImages`` or ``images`` in the folder
            or beside it, or the folder itself.
        split: name of a list in ``ImageSets``, text file with names, or folder; "" for everything.
        names: class names in the order of their ids; by default the sorted names in all XML files,
            whatever the split.
        first_pixel: number of the upper left pixel, 0 or 1; with 1, boxes include the pixels of
            both corners. None for 1 in files that state PASCAL VOC as their source, otherwise 0.
        skip_difficult: whether to leave out objects that are marked difficult.

    Returns:
        The conversion, and the folder to which the names of its images are relative.

    Raises:
        UserError: if there are no XML files, no images, or no such split.
    """
    files = find_files(folder, [".xml"])
    if not files:
        raise UserError(f"{folder} has no XML files, give the folder of the annotations")
    images = ImageFolder(images_folder) if images_folder else _find_images(folder)
    parsed = {file: _parse(file) for file in files}
    if names is None:
        roots = [root for root in parsed.values() if root is not None]
        found = {_text(item, "name") for root in roots for item in root.findall("object")} - {""}
        classes = ClassNames.from_list(sorted(found), f"the XML files of {folder}")
    else:
        classes = ClassNames.from_list(names, "the list of names")
    conversion = Conversion(classes)
    conversion.note_similar_classes()
    reader = _Reader(folder, images, conversion, first_pixel, skip_difficult)
    for file in _select(folder, files, split, conversion) if split else files:
        reader.add_file(file, parsed[file])
    if not split:
        stems = {path for file in files for path in images.find(file.stem)}
        for file in images.files:
            if file not in stems and file not in reader.taken:
                conversion.findings.note("images without an XML file, not converted", str(file))
    return conversion, images.root
