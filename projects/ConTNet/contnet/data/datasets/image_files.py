"""Opens image files, and finds the files of listed images, also under slightly different names."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import unquote

from PIL import Image

from contnet.utils.files import file_names, open_regular

__all__ = [
    "IMAGE_ENDINGS",
    "IMAGE_FORMATS",
    "Match",
    "find_beside",
    "find_missing",
    "match_names",
    "open_image",
]

# Pillow's names of the formats that are opened; MPO is opened as JPEG. Others are excluded, such as
# EPS, which would run Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF")
IMAGE_ENDINGS = tuple(
    ending for ending, kind in Image.registered_extensions().items() if kind in IMAGE_FORMATS
)
_LOOKED_AT = 1_000_000  # files after which listing a folder stops
_BASES = 20  # missing images that are looked for in neighbouring folders


@contextmanager
def open_image(source: str | Path | IO[bytes]) -> Iterator[Image.Image]:
    """Opens an image as stored, without decoding its pixels.

    Args:
        source: path of a file, or a stream of its bytes.

    Raises:
        OSError: if its format is not in :data:`IMAGE_FORMATS`, or it is not a regular file.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(source, (str, Path)):
            source = stack.enter_context(open_regular(source))
        yield stack.enter_context(Image.open(source, formats=IMAGE_FORMATS))


class Match(NamedTuple):
    """The file to which an image's name most likely refers.

    Attributes:
        path: path of the file within the folder.
        difference: how the name differs.
    """

    path: str
    difference: str


def find_missing(root: str, names: Iterable[str]) -> list[str]:
    """Returns the names, without duplicates, for which there is no file.

    Args:
        root: folder to which the names are relative.
        names: names of images.
    """
    by_folder = defaultdict(list)
    for name in dict.fromkeys(names):
        folder, file = os.path.split(os.path.join(root, name))
        by_folder[folder].append((file, name))
    missing = []
    for folder, pairs in by_folder.items():
        present = file_names(folder)
        missing += [name for file, name in pairs if file not in present]
    return missing


def _parts(name: str) -> list[str]:
    """Returns the folders and the file of a name, whichever system it was written on."""
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]


def _unicode(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _same(text: str) -> str:
    return text


def _stem(text: str) -> str:
    return os.path.splitext(_unicode(text).casefold())[0]


def _unquoted(text: str) -> str:
    return _unicode(unquote(text).strip()).casefold()


# Comparisons of file names, the strictest first, and the difference that each one ignores.
_COMPARISONS: tuple[tuple[Callable[[str], str], str], ...] = (
    (_same, ""),
    (_unicode, "another Unicode form of the same letters, NFC or NFD"),
    (lambda text: _unicode(text).casefold(), "upper or lower case"),
    (_unquoted, "escapes or spaces"),
    (_stem, "another ending"),
)


def _list_files(root: str) -> list[list[str]]:
    """Returns the parts of the paths of all files below a folder."""
    found = []
    for folder, folders, _ in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        above = _parts(os.path.relpath(folder, root))
        found += [[*above, name] for name in file_names(folder) if not name.startswith("._")]
        if len(found) > _LOOKED_AT:
            break
    return found


class _Paths:
    """Finds files by the ends of their paths.

    One of file path and name must end with the other, because ``train/1.jpg`` is not the same image
    as ``val/1.jpg``.

    Args:
        files: parts of the files' paths.
        names: parts of the names that will be looked up.
        compare: normalises what may differ.
        deeper: whether a file may be in folders that the name does not have.
    """

    def __init__(
        self,
        files: Iterable[list[str]],
        names: Iterable[list[str]],
        compare: Callable[[str], str],
        deeper: bool,
    ):
        self._compare = compare
        self._whole, self._ends = defaultdict(list), defaultdict(list)
        self._deepest = 0
        bases, lengths = {compare(name[-1]) for name in names}, {len(name) for name in names}
        for file in files:
            if compare(file[-1]) not in bases:
                continue
            key = tuple(map(compare, file))
            self._whole[key].append(file)
            self._deepest = max(self._deepest, len(file))
            for length in lengths if deeper else ():
                if length < len(file):
                    self._ends[key[-length:]].append(file)

    def nearest(self, name: list[str]) -> list[str] | None:
        """Returns the file that shares most folders with a name; None if there is none or a tie."""
        if not self._deepest:
            return None
        key = tuple(map(self._compare, name[-self._deepest :]))
        whole = len(key) == len(name)
        for start in range(len(key)):
            end = key[start:]
            found = self._whole.get(end, [])
            if start == 0 and whole:
                found = found + self._ends.get(end, [])
            if found:
                return found[0] if len(found) == 1 else None
        return None


def _describe(name: str, found: list[str], what: str) -> str:
    """Returns how a name differs from that of its file."""
    parts = _parts(name)
    differences = [what] if what else []
    if "\\" in name:
        differences.append("\\ instead of /")
    if len(parts) > len(found):
        differences.append("a leading path that the image folder does not have")
    elif len(parts) < len(found):
        differences.append(f"they are in {'/'.join(found[: -len(parts)])}/")
    return " and ".join(differences) or "another folder"


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _companions(files: Iterable[list[str]], taken: Iterable[str]) -> set[str]:
    """Returns the extensions of files that accompany images, such as masks and label files."""
    stems = {os.path.splitext(path)[0] for path in taken}
    paths = map("/".join, files)
    return {_ending(path) for path in paths if os.path.splitext(path)[0] in stems}


def match_names(root: str, missing: Sequence[str], names: Iterable[str]) -> dict[str, Match]:
    """Finds the files that missing images most likely refer to.

    A file is not used if several names or another image refer to it. If some images are in their
    places, deeper folders are not searched for the others.

    Args:
        root: the image folder.
        missing: result of :func:`find_missing`.
        names: names of all images.
    """
    files = _list_files(root)
    taken = set(names) - set(missing)
    taken = {os.path.normpath(name) for name in taken}
    free = [file for file in files if "/".join(file) not in taken]
    endings = set(IMAGE_ENDINGS) - _companions(free, taken)
    found: dict[str, Match] = {}
    for compare, what in _COMPARISONS:
        if compare is _stem:
            free = [file for file in free if _ending(file[-1]) in endings]
        deeper = not taken and compare is not _stem
        sought = {name: parts for name in missing if name not in found and (parts := _parts(name))}
        paths = _Paths(free, sought.values(), compare, deeper)
        for name, parts in sought.items():
            if file := paths.nearest(parts):
                found[name] = Match("/".join(file), _describe(name, file, what))
    claims = Counter(match.path for match in found.values())
    return {name: match for name, match in found.items() if claims[match.path] == 1}


def find_beside(root: str, missing: Sequence[str]) -> str | None:
    """Returns the folder beside or above the image folder that has the missing images, or None.

    Args:
        root: the image folder.
        missing: names of images.
    """
    some = [_parts(name)[-1] for name in missing[:_BASES] if _parts(name)]
    above = Path(os.path.abspath(root)).parent
    for folder in [above, *sorted(path for path in above.iterdir() if path.is_dir())]:
        if some and set(some) <= file_names(folder):
            return str(folder)
    return None
