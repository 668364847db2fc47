"""Reads YOLO labels: a text file beside each image or in a labels folder, one line per object."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import yaml

from contnet.data.conversion.common import (
    ClassNames,
    Conversion,
    ImageFolder,
    Points,
    bounding_box,
    comparable,
    find_files,
    read_text,
)
from contnet.data.datasets.image_files import IMAGE_ENDINGS
from contnet.utils.errors import UserError
from contnet.utils.text import first_names
from contnet.utils.yaml_text import parse_yaml

__all__ = ["convert_yolo", "read_names"]

# Limits of data.yaml in characters and values: enough for tens of thousands of class names.
_LARGEST, _MOST_VALUES = 2**22, 500_000
_YAML = (".yaml", ".yml")
_NAME_FILES = ("data.yaml", "dataset.yaml", "data.yml", "classes.txt", "obj.names")
# These are searched only in the folder itself.
_OTHER_NAME_FILES = ("labels/classes.txt", "*.yaml", "*.yml", "*.names", "*/classes.txt")
# Bounds of relative coordinates, with a margin for rounding.
_LEAST, _MOST = -0.01, 1.01


def _read_yaml(file: Path) -> dict:
    try:
        content = parse_yaml(read_text(file), _LARGEST, _MOST_VALUES)
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid yaml: {getattr(error, 'problem', error)}") from error
    return content if isinstance(content, dict) else {}


def _class_numbers(names: object, file: Path) -> dict[int, str]:
    """Returns class names by number, from a list or a dict."""
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        if any(isinstance(name, list | dict) for name in dict(names).values()):
            raise ValueError("a name is not a string")
        return {int(number): str(names[number]).strip() for number in sorted(names, key=int)}
    except (OverflowError, TypeError, ValueError) as error:
        form = "write names: [cat, dog] or names: {0: cat, 1: dog}"
        raise UserError(f"{file} has no numbered class names: {form}") from error


def read_names(file: Path) -> dict[int, str]:
    """Returns class names by number: ``names`` of a YAML file, or the lines of any other file.

    Raises:
        UserError: if the file cannot be read, or a YAML file has no valid names.
    """
    if file.suffix.lower() in _YAML:
        return _class_numbers(_read_yaml(file).get("names"), file)
    return dict(enumerate(line.strip() for line in read_text(file).splitlines() if line.strip()))


def _find_names(folder: Path) -> Path:
    """Returns the file with the class names, in the folder or up to two levels above."""
    places = [(place, _NAME_FILES) for place in (folder, *folder.absolute().parents[:2])]
    for place, patterns in ((folder, _NAME_FILES), (folder, _OTHER_NAME_FILES), *places[1:]):
        for pattern in patterns:
            found = sorted(place.glob(pattern))
            if pattern.endswith(_YAML):
                found = [file for file in found if "names" in _read_yaml(file)]
            if len(found) > 1:
                names = first_names([file.name for file in found])
                raise UserError(
                    f"{place} has {names}: choose the one with the class names by --names"
                )
            if found:
                return found[0]
    raise UserError(
        f"{folder} has no class names: give data.yaml or classes.txt (one per line) with --names"
    )


# --- which images --------------------------------------------------------------------------------


def _swap(path: Path, one: str, other: str) -> Path | None:
    """Renames the last folder called ``one`` in a path; returns None if there is none."""
    parts = list(path.parts)
    for place in reversed(range(len(parts))):
        if parts[place].lower() == one:
            return Path(*parts[:place], other, *parts[place + 1 :])
    return None


def _find_images(folder: Path) -> Path:
    """Returns the image folder: the given folder, or the one that belongs to a labels folder."""
    for place in (folder, _swap(folder.absolute(), "labels", "images"), folder / ".." / "images"):
        if place and place.is_dir() and find_files(place, IMAGE_ENDINGS):
            return place
    raise UserError(
        f"there are no images in {folder} or next to it: give their folder with --images"
    )


def _candidates(value: str, base: Path, content: dict) -> list[Path]:
    """Returns paths to which an entry of data.yaml may refer; the first that exists is used."""
    value = value.replace("\\", "/")
    tails = PurePosixPath(value).parts
    found = [base / str(content.get("path") or "") / value, base / value]
    # Paths of Roboflow begin with "..", others may be those of another machine.
    return found + [base.joinpath(*tails[start:]) for start in range(len(tails))]


def _split_paths(folder: Path, split: str, names_file: Path | None) -> list[Path]:
    """Returns the image folders and image lists of a split."""
    known = []
    if names_file and names_file.suffix.lower() in _YAML:
        content = _read_yaml(names_file)
        known = [key for key in ("train", "val", "valid", "test") if content.get(key)]
        alias = {"val": "valid", "valid": "val"}.get(split, split)
        if value := content.get(split) or content.get(alias):
            values = value if isinstance(value, list) else [value]
            paths = []
            for each in map(str, values):
                places = _candidates(each, names_file.parent, content)
                there = [place for place in places if place.exists()]
                if not there:
                    raise UserError(f"{names_file}: {split} is {each}, which does not exist")
                paths.append(there[0])
            return paths
    given = Path(split)
    if given.suffix == ".txt" and given.is_file():
        return [given]
    for place in ((f"images/{split}"), f"{split}/images", split, f"{split}.txt"):
        if (folder / place).exists():
            return [folder / place]
    there = f"there are {first_names(known)}" if known else "no data.yaml or folder names it"
    raise UserError(f"{folder} has no split {split}: {there}")


def _listed(conversion: Conversion, file: Path, folder: Path, images: ImageFolder) -> list[Path]:
    """Returns the images of a list, with paths from its folder, the data set's or elsewhere."""
    chosen = []
    for line in dict.fromkeys(filter(None, map(str.strip, read_text(file).splitlines()))):
        name = line.replace("\\", "/")
        places = [place for place in (file.parent / name, folder / name) if place.is_file()]
        found = places[:1]
        tails = PurePosixPath(name).parts
        for start in range(len(tails) if not found else 0):
            if found := images.find("/".join(tails[start:])):
                break
        if len(found) == 1:
            chosen.append(Path(os.path.abspath(found[0])))
        else:
            conversion.read["images"] += 1
            why = "several have the listed name" if found else "listed, but not found"
            conversion.leave_image(why, f"{file.name}: {line}")
    return chosen


# --- labels --------------------------------------------------------------------------------------


def _parse_line(words: Sequence[str], keypoints: int) -> tuple[int, list[float], str]:
    """Parses a line to class number, coordinates and kind: "box", "polygon", "keypoints", "sixth".

    Raises:
        ValueError: if the line is not valid; the message completes "objects left out, ...".
    """
    try:
        first, *numbers = map(float, words)
    except ValueError:
        raise ValueError("with words that are not numbers") from None
    if not all(map(math.isfinite, (first, *numbers))) or first != int(first):
        raise ValueError("with numbers that are not finite, or a class that is not an integer")
    kind = "box"
    if keypoints and len(numbers) == 4 + keypoints:
        kind, numbers = "keypoints", numbers[:4]
    elif len(numbers) == 5:
        kind, numbers = "sixth", numbers[:4]
    elif len(numbers) >= 6 and len(numbers) % 2 == 0:
        kind = "polygon"
    elif len(numbers) != 4:
        raise ValueError("whose number of columns fits neither a box nor a polygon")
    if not all(_LEAST <= number <= _MOST for number in numbers):
        raise ValueError("with numbers outside 0 to 1, such as pixels (YOLO's are relative)")
    return int(first), numbers, kind


def _to_points(numbers: list[float], kind: str, width: int, height: int) -> Points:
    if kind == "polygon":
        return [(x * width, y * height) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
    x, y, w, h = numbers
    return [
        ((x - w / 2) * width, (y - h / 2) * height),
        ((x + w / 2) * width, (y + h / 2) * height),
    ]


def _is_labels(text: str) -> bool:
    """Whether a text contains objects, not class names or paths."""
    try:
        return all(len([float(word) for word in line.split()]) != 1 for line in text.splitlines())
    except ValueError:
        return False


@dataclass
class _Reader:
    """Adds images of a folder to a conversion."""

    folder: Path
    images: ImageFolder
    conversion: Conversion
    names: dict[int, str]
    keypoints: int
    used: dict[Path, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.labels = {comparable(str(file)): file for file in find_files(self.folder, [".txt"])}

    def _find_labels(self, image: Path) -> Path | None:
        """Returns an image's label file: in labels/ for images/, beside it, or in the folder."""
        own = image.with_suffix(".txt")
        name = Path(self.images.name(image)).with_suffix(".txt")
        swapped = _swap(own, "images", "labels")
        inside = [self.folder / name, self.folder / "labels" / name]
        inside += [self.folder / own.name, self.folder / "labels" / own.name]
        for place in filter(None, (swapped, own, *inside)):
            if (found := self.labels.get(comparable(str(place)))) or place.is_file():
                return found or place
        return None

    def add_image(self, image: Path) -> None:
        """Adds an image with its objects, or leaves it out."""
        name, conversion = self.images.name(image), self.conversion
        conversion.read["images"] += 1
        file = self._find_labels(image)
        if file is None:
            conversion.findings.note("images without a label file, written without objects", name)
        try:
            lines = read_text(file).splitlines() if file else []
        except UserError as error:
            conversion.leave_image("their label file cannot be read", str(error))
            return
        rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
        conversion.read["objects"] += len(rows)
        if file and file in self.used:
            what = "images that share a label file"
            conversion.findings.note(what, f"{name} and {self.images.name(self.used[file])}")
        if file:
            self.used[file] = image
        if measured := conversion.measure(image, len(rows)):
            conversion.add_image(name, measured[:2])
            for number, words in rows:
                self._add_object(words, f"{file}, line {number}", *measured[:2])

    def _add_object(self, words: list[str], place: str, width: int, height: int) -> None:
        try:
            number, numbers, kind = _parse_line(words, self.keypoints)
        except ValueError as error:
            self.conversion.leave_object(str(error), place)
            return
        if number not in self.names:
            why = f"whose class number is not in {self.conversion.classes.origin}"
            self.conversion.leave_object(why, f"{place} ({number})")
            return
        if kind == "sixth":
            self.conversion.findings.note("boxes with a sixth number, ignored", place)
        elif kind == "keypoints":
            self.conversion.findings.note(
                "objects with keypoints, of which only the box is converted", place
            )
        points = _to_points(numbers, kind, width, height)
        if kind != "polygon" and points != bounding_box(points):
            self.conversion.leave_object("with a negative width or height", place)
            return
        self.conversion.add_object(self.names[number], points, place, polygon=kind == "polygon")

    def leave_unused(self, names_file: Path) -> None:
        """Leaves out label files that belong to no image."""
        for file in self.labels.values():
            if file in self.used or file == names_file:
                continue
            try:
                text = read_text(file)
            except UserError:
                continue
            if _is_labels(text):
                objects = sum(1 for line in text.splitlines() if line.strip())
                self.conversion.read.update(images=1, objects=objects)
                self.conversion.leave_image("a label file without its image", str(file), objects)


def convert_yolo(
    folder: Path,
    images_folder: Path | None = None,
    *,
    split: str = "",
    names_file: Path | None = None,
) -> tuple[Conversion, Path]:
    """Reads a data set with YOLO labels.

    Args:
        folder: folder with images and labels, in subfolders or together, or with only the labels.
        images_folder: folder with the images; by default ``images`` for ``labels``, or ``folder``.
        split: key of data.yaml, name of a folder, or list of images; "" for everything.
        names_file: data.yaml, or a file with one name per line; by default searched in the folder
            and above. Category ids are class numbers plus 1.

    Returns:
        The conversion, and the folder to which the names of its images are relative.

    Raises:
        UserError: if there are no images, no names, or no such split.
    """
    names_file = names_file or _find_names(folder)
    numbers = read_names(names_file)
    classes = ClassNames.from_list(list(numbers.values()), str(names_file))
    classes.ids = {name: number + 1 for number, name in numbers.items()}
    conversion = Conversion(classes)
    conversion.note_similar_classes()
    folder = Path(os.path.abspath(folder))
    given = Path(os.path.abspath(images_folder)) if images_folder else None
    if split:
        paths = [Path(os.path.abspath(p)) for p in _split_paths(given or folder, split, names_file)]
        root = given or folder
        everything = ImageFolder(root)
        chosen = []
        for path in paths:
            if path.is_dir():
                chosen += find_files(path, IMAGE_ENDINGS)
            else:
                chosen += _listed(conversion, path, folder, everything)
        if any(not image.is_relative_to(root) for image in chosen):
            root = Path(os.path.commonpath([image.parent for image in chosen]))
        images = ImageFolder(root, chosen)
    else:
        images = ImageFolder(given or Path(os.path.abspath(_find_images(folder))))
    shape = _read_yaml(names_file).get("kpt_shape") if names_file.suffix in _YAML else None
    counted = isinstance(shape, list) and all(isinstance(each, int) for each in shape)
    keypoints = math.prod(shape) if counted else 0
    reader = _Reader(folder, images, conversion, numbers, keypoints)
    for image in dict.fromkeys(images.files):
        reader.add_image(image)
    if not split:
        reader.leave_unused(names_file)
    return conversion, images.root
