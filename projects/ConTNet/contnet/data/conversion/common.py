"""Shared parts of the conversions to COCO format: lookup of images, boxes, counts, the file."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from contnet.data.datasets.image_files import IMAGE_ENDINGS
from contnet.data.findings import ERROR, NOTE, Findings
from contnet.data.pipeline.images import decode_error, read_size
from contnet.utils.errors import UserError
from contnet.utils.files import atomic_write, open_regular

__all__ = [
    "ClassNames",
    "Conversion",
    "ImageFolder",
    "Points",
    "bounding_box",
    "comparable",
    "find_files",
    "read_text",
    "turn",
]

Points = list[tuple[float, float]]

# By EXIF orientation: maps a point of the stored image (width w, height h) to the upright image.
_TURNS: dict[int, Callable[[float, float, int, int], tuple[float, float]]] = {
    2: lambda x, y, w, h: (w - x, y),
    3: lambda x, y, w, h: (w - x, h - y),
    4: lambda x, y, w, h: (x, h - y),
    5: lambda x, y, w, h: (y, x),
    6: lambda x, y, w, h: (h - y, x),
    7: lambda x, y, w, h: (h - y, w - x),
    8: lambda x, y, w, h: (y, w - x),
}
# Pixels by which a box may exceed its image without a note, because of rounding.
_ROUNDING = 1.0
_DIGITS = 6


def find_files(folder: Path, endings: Iterable[str]) -> list[Path]:
    """Returns the files below a folder, sorted by path, without hidden ones such as ``._1.jpg``."""
    endings = tuple(endings)
    found = (path for path in folder.rglob("*") if path.name.lower().endswith(endings))
    kept = (path for path in found if not path.name.startswith(".") and path.is_file())
    return sorted(kept, key=lambda path: path.relative_to(folder).as_posix())


def read_text(file: Path) -> str:
    """Returns the text of a UTF-8 file, with or without a byte order mark.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        with open_regular(file, "r", encoding="utf-8-sig") as text:
            return text.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def comparable(name: str) -> str:
    """Normalises case, path separators and Unicode form of a name, for comparisons."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


def _stem(name: str) -> str:
    """Returns the name without an image extension; other dots are part of the name."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in IMAGE_ENDINGS else name


class ImageFolder:
    """The images below a folder, which can be found by the names that annotations use.

    Attributes:
        root: the folder.
        files: paths of the images, sorted by name unless they were given.
    """

    def __init__(self, root: Path, files: Sequence[Path] | None = None) -> None:
        self.root = root
        self.files = find_files(root, IMAGE_ENDINGS) if files is None else list(files)
        self._by_name = defaultdict(list)
        for file in self.files:
            name = comparable(self.name(file))
            last = name.rpartition("/")[2]
            for key in {name, _stem(name), last, _stem(last)}:
                self._by_name[key].append(file)

    def name(self, file: Path) -> str:
        """Returns an image's path relative to the root, its ``file_name`` in COCO format."""
        return file.relative_to(self.root).as_posix()

    def find(self, name: str) -> list[Path]:
        """Returns the images that a name or path may mean: none if unknown, several if ambiguous.

        The whole path is tried first, then without its extension, then only its last part, with
        and without extension.
        """
        name = comparable(name.strip())
        last = name.rpartition("/")[2]
        for key in (name, _stem(name), last, _stem(last)):
            if key and key in self._by_name:
                return self._by_name[key]
        return []


def turn(points: Points, orientation: int, size: tuple[int, int]) -> Points:
    """Maps points of the stored image to the upright image.

    Args:
        points: x and y in pixels.
        orientation: EXIF orientation, 1 to 8.
        size: width and height of the upright image.
    """
    if orientation not in _TURNS:
        return points
    width, height = size if orientation < 5 else size[::-1]
    return [_TURNS[orientation](x, y, width, height) for x, y in points]


def bounding_box(points: Points) -> Points:
    """Returns the upper left and lower right corners of the box around points."""
    xs, ys = zip(*points, strict=True)
    return [(min(xs), min(ys)), (max(xs), max(ys))]


def _polygon_area(points: Points) -> float:
    following = [*points[1:], points[0]]
    return abs(sum(x * v - u * y for (x, y), (u, v) in zip(points, following, strict=True))) / 2


@dataclass
class ClassNames:
    """The classes of a data set.

    Attributes:
        ids: category id by name, in the order of the ids.
        origin: where the names come from, for messages.
    """

    ids: dict[str, int]
    origin: str

    @classmethod
    def from_list(cls, names: Sequence[str], origin: str) -> ClassNames:
        """Numbers classes from 1.

        Raises:
            UserError: if there are no names, or a name occurs twice.
        """
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UserError(f"{origin} has the class {twice[0]} twice: give each its own name")
        if not names:
            raise UserError(f"{origin} has no class names")
        return cls({name: number for number, name in enumerate(names, 1)}, origin)


@dataclass
class Conversion:
    """A data set that is being converted to COCO format.

    Attributes:
        classes: its classes.
        images, annotations: entries of the file to write.
        read: number of images and objects in the source.
        left_out: number of these images and objects that are not converted.
        findings: why something was left out (errors, or notes if an option asked for it), and what
            was changed (notes).
    """

    classes: ClassNames
    images: list[dict] = field(default_factory=list)
    annotations: list[dict] = field(default_factory=list)
    read: Counter = field(default_factory=Counter)
    left_out: Counter = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)

    def note_similar_classes(self) -> None:
        """Notes class names that differ only in case or Unicode form, perhaps by mistake."""
        groups = defaultdict(list)
        for name in self.classes.ids:
            groups[comparable(name)].append(name)
        for names in groups.values():
            if len(names) > 1:
                self.findings.note(
                    "classes whose names differ only in case or Unicode form",
                    ", ".join(names),
                )

    def measure(self, file: Path, objects: int) -> tuple[int, int, int] | None:
        """Returns :func:`read_size` of an image; leaves out an unreadable one and returns None."""
        try:
            return read_size({"file_name": str(file)}, max_pixels=0)
        except UserError as error:
            reason = decode_error(error.__cause__)
            self.leave_image("cannot be read", f"{file} ({reason})", objects)
            return None

    def add_image(self, name: str, size: tuple[int, int]) -> None:
        """Adds an image, to which the objects that are added next belong."""
        width, height = size
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": name, "width": width, "height": height})

    def leave_image(self, why: str, place: str, objects: int = 0) -> None:
        """Counts an image and its objects as left out."""
        self.left_out.update(images=1, objects=objects)
        self.findings.error(f"images left out, {why}", place)

    def leave_object(self, why: str, place: str, *, wanted: bool = False) -> None:
        """Counts an object as left out: an error, or a note if an option ``wanted`` it."""
        self.left_out["objects"] += 1
        self.findings.add(NOTE if wanted else ERROR, f"objects left out, {why}", place)

    def add_object(
        self, name: str, points: Points, place: str, *, polygon: bool, **fields: int
    ) -> None:
        """Adds an object of the last image, clipped to the image, or leaves it out.

        Args:
            name: name of its class.
            points: pixels of the upright image: two corners of its box, or a polygon.
            place: where the source has the object, for messages.
            polygon: whether ``points`` is a polygon.
            fields: further keys of its annotation.
        """
        if not name:
            self.leave_object("without a class", place)
            return
        if name not in self.classes.ids:
            self.leave_object(f"whose class is not in {self.classes.origin}", place)
            return
        image = self.images[-1]
        width, height = image["width"], image["height"]
        inside = [(min(max(x, 0), width), min(max(y, 0), height)) for x, y in points]
        (left, top), (right, bottom) = bounding_box(inside)
        area = _polygon_area(inside) if polygon else (right - left) * (bottom - top)
        if not area > 0:
            self.leave_object("without area inside the image", place)
            return
        cut = max(
            max(abs(x - u), abs(y - v)) for (x, y), (u, v) in zip(points, inside, strict=True)
        )
        if cut > _ROUNDING:
            self.findings.note("objects cut at the edge of their image", place)
        box = [round(value, _DIGITS) for value in (left, top, right - left, bottom - top)]
        annotation = {
            "id": len(self.annotations) + 1,
            "image_id": image["id"],
            "category_id": self.classes.ids[name],
            "bbox": box,
            "area": round(area, _DIGITS),
            "iscrowd": 0,
            **fields,
        }
        if polygon:
            flat = [round(value, _DIGITS) for point in inside for value in point]
            annotation["segmentation"] = [flat]
        self.annotations.append(annotation)

    def content(self) -> dict:
        """Returns the content of the annotation file in COCO format."""
        return {
            "info": {"description": "made by tools/convert_dataset.py"},
            "licenses": [],
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": id_, "name": name} for name, id_ in self.classes.ids.items()],
        }

    def write(self, file: Path) -> dict[str, int]:
        """Writes the file, reads it back and compares the counts.

        Returns:
            Number of images, objects and classes in the file, and of ``empty`` images.

        Raises:
            UserError: if there is no image, or the file cannot be written.
        """
        if not self.images:
            raise UserError(f"no image could be converted, so {file} is not written")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file, "w") as stream:
                json.dump(self.content(), stream)
            content = json.loads(file.read_text())
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}") from error
        counts = {
            "images": len(content["images"]),
            "objects": len(content["annotations"]),
            "classes": len(content["categories"]),
        }
        for what in ("images", "objects"):
            if counts[what] + self.left_out[what] != self.read[what]:
                raise RuntimeError(
                    f"{self.read[what]} {what} were read, {counts[what]} written and "
                    f"{self.left_out[what]} left out"
                )
        used = {annotation["image_id"] for annotation in content["annotations"]}
        return {**counts, "empty": counts["images"] - len(used)}
