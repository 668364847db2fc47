"""Finds the inputs of predictions: image files, folders, glob patterns, COCO files, videos."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from contnet.data.datasets.coco import read_instances
from contnet.data.datasets.image_files import IMAGE_ENDINGS
from contnet.utils.errors import UsageError

__all__ = ["VIDEO_ENDINGS", "Input", "Inputs", "find_inputs"]

VIDEO_ENDINGS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


@dataclass(frozen=True)
class Input:
    """An image file, or a video.

    Attributes:
        path: path of the file.
        name: unique name of its outputs: a relative path without a suffix.
        image_id: id in the results: the id from the COCO file, or the file's name.
    """

    path: str
    name: str
    image_id: int | str

    @property
    def is_video(self) -> bool:
        """Whether it is a video."""
        return self.path.lower().endswith(VIDEO_ENDINGS)


@dataclass(frozen=True)
class Inputs:
    """The files to predict.

    Attributes:
        files: in the order of the arguments; those of a folder sorted by name.
        categories: from COCO files: category ids by class names.
    """

    files: list[Input] = field(default_factory=list)
    categories: dict[str, int] = field(default_factory=dict)


# A file, its displayed name, and its id in a COCO file.
_Found = tuple[Path, str, int | str | None]


def _is_wanted(path: Path) -> bool:
    return path.name.lower().endswith((*IMAGE_ENDINGS, *VIDEO_ENDINGS))


def _in_folder(folder: Path) -> Iterator[_Found]:
    """Yields the images and videos below a folder, without hidden ones."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if _is_wanted(path) and not hidden and path.is_file():
            yield path, str(relative), None


def _of_coco(file: Path, root: str, categories: dict[str, int]) -> Iterator[_Found]:
    content = read_instances(str(file))
    for category in content.get("categories") or ():
        name, number = category.get("name"), category.get("id")
        if categories.setdefault(name, number) != number:
            raise UsageError(f"{file}: the category {name} has another id in an earlier file")
    for image in content["images"]:
        name = image.get("file_name")
        if not isinstance(name, str) or not isinstance(image.get("id"), (int, str)):
            raise UsageError(
                f"{file}: each image must have a file_name, and a number or a string as id"
            )
        yield Path(root or file.parent, name), name, image["id"]


def _expand(argument: str, root: str, categories: dict[str, int]) -> list[_Found]:
    path = Path(argument)
    if path.is_dir():
        if not (found := list(_in_folder(path))):
            raise UsageError(f"{argument} contains no images or videos")
        return found
    if path.exists():
        if path.suffix.lower() == ".json":
            return list(_of_coco(path, root, categories))
        return [(path, path.name, None)]
    matches = sorted(map(Path, glob.glob(argument, recursive=True)))
    if not (found := [(each, each.name, None) for each in matches if _is_wanted(each)]):
        raise UsageError(f"{argument} does not exist, and matches no image or video")
    return found


def _output_names(names: Iterable[str]) -> list[str]:
    """Returns unique relative paths without suffixes, which stay inside the output folder."""
    taken: set[str] = set()
    result = []
    for name in names:
        parts = [part for part in PurePath(name).parts if part not in ("..", ".", "/")]
        stem = str(PurePath(*parts).with_suffix("")) if parts else "image"
        unique, number = stem, 2
        while unique.casefold() in taken:
            unique, number = f"{stem}_{number}", number + 1
        taken.add(unique.casefold())
        result.append(unique)
    return result


def find_inputs(
    arguments: Sequence[str], lines: Iterable[str] = (), image_root: str = ""
) -> Inputs:
    """Finds the files of a command's arguments.

    Args:
        arguments: image files, videos, folders (recursively), patterns such as ``a/**/*.jpg``,
            annotation files in COCO format, and ``-`` for paths from ``lines``.
        lines: lines of the standard input; each is an argument.
        image_root: image folder of annotation files; by default, the folder of the file.

    Raises:
        UsageError: for an argument that matches no file.
    """
    categories: dict[str, int] = {}
    found: list[_Found] = []
    for argument in arguments:
        given = filter(None, map(str.strip, lines)) if argument == "-" else [argument]
        for each in given:
            found += _expand(each, image_root, categories)
    names = _output_names(name for _, name, _ in found)
    files = [
        Input(str(path), name, shown if number is None else number)
        for (path, shown, number), name in zip(found, names, strict=True)
    ]
    if not files:
        raise UsageError("there is nothing to predict: the inputs are empty")
    return Inputs(files, categories)
