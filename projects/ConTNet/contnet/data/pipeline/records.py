"""A file of data set records that processes share: written once, then mapped into memory.

The records come first, then tables of numbers, then a header, and at the end the header's place
and a SHA-256 of all that precedes it. A record is JSON in which a polygon of floats is only a
count; the floats follow. So reading is fast, gives back the very same values, and runs no code.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from detectron2.structures import BoxMode

from contnet.utils.files import atomic_write

__all__ = ["RecordFile", "Records", "write_records"]

_MAGIC = b"records of contnet, 1\n\0\0"
_END = struct.Struct("<Q32s")  # where the header starts; digest
_LENGTH = struct.Struct("<I")  # of a record's JSON
_FLOAT = np.dtype("<f8")
_COUNT = np.dtype("<i8")
_BYTE = np.dtype("u1")
_PIECE = 1 << 22


# --- one record ----------------------------------------------------------------------------------


def _is_floats(values: object) -> bool:
    return isinstance(values, list) and set(map(type, values)) == {float}


def _pack_mask(mask: list | dict, numbers: list[float]) -> list | dict:
    """A segmentation as JSON can hold it; floats of polygons go to ``numbers``."""
    if isinstance(mask, dict):
        counts = mask["counts"]
        return {**mask, "counts": [counts.decode("ascii")]} if isinstance(counts, bytes) else mask
    packed = []
    for polygon in mask:
        if _is_floats(polygon):
            numbers += polygon
            polygon = len(polygon)
        packed.append(polygon)
    return packed


def _unpack_mask(mask: list | dict, numbers: Iterator[float]) -> list | dict:
    if isinstance(mask, dict):
        # Lists of counts do not get here: loaders compress such masks, into bytes.
        counts = mask["counts"]
        return {**mask, "counts": counts[0].encode("ascii")} if isinstance(counts, list) else mask
    return [
        list(itertools.islice(numbers, part)) if isinstance(part, int) else part for part in mask
    ]


def _pack(record: dict) -> bytes:
    numbers: list[float] = []
    if "annotations" in record:
        items = []
        for item in record["annotations"]:
            packed = dict(item)
            if "segmentation" in item:
                packed["segmentation"] = _pack_mask(item["segmentation"], numbers)
            if "bbox_mode" in item:
                packed["bbox_mode"] = int(item["bbox_mode"])
            if isinstance(item.get("bbox"), tuple):
                packed["bbox"] = {"tuple": item["bbox"]}
            items.append(packed)
        record = {**record, "annotations": items}
    text = json.dumps(record, separators=(",", ":")).encode("ascii")
    return _LENGTH.pack(len(text)) + text + np.asarray(numbers, _FLOAT).tobytes()


def _unpack(data: memoryview) -> dict:
    start = _LENGTH.size
    end = start + _LENGTH.unpack_from(data)[0]
    record = json.loads(str(data[start:end], "ascii"))
    numbers = iter(np.frombuffer(data[end:], _FLOAT).tolist())
    for item in record.get("annotations", ()):
        if "segmentation" in item:
            item["segmentation"] = _unpack_mask(item["segmentation"], numbers)
        if "bbox_mode" in item:
            item["bbox_mode"] = BoxMode(item["bbox_mode"])
        if isinstance(item.get("bbox"), dict):
            item["bbox"] = tuple(item["bbox"]["tuple"])
    return record


def _is_usable(record: dict) -> bool:
    """Whether Detectron2 keeps an image where it leaves out those without annotations."""
    items = record.get("annotations")
    return items is None or any(item.get("iscrowd", 0) == 0 for item in items)


# --- the file ------------------------------------------------------------------------------------


class _Hashed:
    """Writes to a file, and digests and counts what it writes."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._digest = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.position += len(data)

    def write_table(self, table: np.ndarray) -> tuple[int, list[int]]:
        """Writes a table at a multiple of 8 bytes; returns its place and shape."""
        self.write(bytes(-self.position % 8))
        place = self.position
        self.write(table.tobytes())
        return place, list(table.shape)

    def end(self, header: bytes) -> None:
        place = self.position
        self.write(header)
        self.write(place.to_bytes(8, "little"))
        self._file.write(self._digest.digest())


def write_records(
    path: Path, records: Iterable[dict], facts: dict, names: Sequence[str] = ()
) -> None:
    """Writes records of Detectron2's form into a file, which is whole or not there.

    Args:
        path: of the file.
        records: with ``width`` and ``height``; each is needed only until the next one.
        facts: what else to keep, little, as JSON can hold it.
        names: a long list of texts to keep.

    Raises:
        OSError: if it cannot be written.
        ValueError: if there are no records.
    """
    starts, sizes, usable = [], [], []
    with atomic_write(path) as target:
        file = _Hashed(target)
        file.write(_MAGIC)
        for row, record in enumerate(records):
            starts.append(file.position)
            sizes.append((record["width"], record["height"]))
            if _is_usable(record):
                usable.append(row)
            file.write(_pack(record))
        if not starts:
            raise ValueError("it has no images")
        starts.append(file.position)
        tables = {
            "starts": file.write_table(np.asarray(starts, _COUNT)),
            "sizes": file.write_table(np.asarray(sizes, _FLOAT)),
            "usable": file.write_table(np.asarray(usable, _COUNT)),
            "names": file.write_table(np.frombuffer(json.dumps(names).encode("ascii"), _BYTE)),
        }
        file.end(json.dumps({"tables": tables, "facts": facts}).encode("ascii"))


class RecordFile(Sequence):
    """The records of a file, read as they are asked for; pickled as its path.

    Args:
        path: of a file that :meth:`is_whole` has found whole.

    Attributes:
        facts: as given to :func:`write_records`.
        sizes: (width, height) of each record's image, (N, 2).
        usable: numbers of the records that have an object that is no crowd.
    """

    def __init__(self, path: str | Path):
        self.path = os.fspath(path)
        with open(path, "rb") as file:
            self._view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        end = len(self._view) - _END.size
        place, _ = _END.unpack_from(self._view, end)
        header = json.loads(str(self._view[place:end], "ascii"))
        self.facts = header["facts"]
        tables = header["tables"]
        self._starts = self._table(_COUNT, *tables["starts"])
        self.sizes = self._table(_FLOAT, *tables["sizes"])
        self.usable = self._table(_COUNT, *tables["usable"])
        self._names = self._table(_BYTE, *tables["names"])

    def _table(self, kind: np.dtype, place: int, shape: Sequence[int]) -> np.ndarray:
        count = int(np.prod(shape))
        return np.frombuffer(self._view, kind, count, place).reshape(shape)

    @property
    def names(self) -> list[str]:
        """As given to :func:`write_records`; a new list each time."""
        return json.loads(self._names.tobytes())

    @staticmethod
    def is_whole(path: str | Path) -> bool:
        """Whether a file is there, and every byte of it as it was written."""
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            left = os.fstat(file.fileno()).st_size - hashlib.sha256().digest_size
            digest = hashlib.sha256()
            while left > 0 and (piece := file.read(min(_PIECE, left))):
                digest.update(piece)
                left -= len(piece)
            return left == 0 and file.read() == digest.digest()
        return False

    def __reduce__(self) -> tuple:
        return RecordFile, (self.path,)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, row: int) -> dict:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return _unpack(self._view[self._starts[row] : self._starts[row + 1]])


class Records(Sequence):
    """The records of one or several files, one after another, as Detectron2's loaders take them.

    Nothing of them is in this process's own memory, so processes that have the same files open
    share them. A record is a new dict each time.

    Args:
        files: in order.
        usable: leave out images without objects, or with crowds alone.
    """

    def __init__(self, files: Sequence[RecordFile], usable: bool):
        self.files = list(files)
        self._usable = usable
        self._ends = list(itertools.accumulate(map(self._count, self.files)))

    def _count(self, file: RecordFile) -> int:
        return len(file.usable if self._usable else file)

    def _find(self, index: int) -> tuple[RecordFile, int]:
        """The file of a record, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self._ends, index)
        file = self.files[part]
        row = index - (self._ends[part - 1] if part else 0)
        return file, int(file.usable[row]) if self._usable else row

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file, row = self._find(index)
        return file[row]

    def size(self, index: int) -> tuple[float, float]:
        """Width and height of a record's image, in pixels."""
        file, row = self._find(index)
        width, height = file.sizes[row]
        return width, height
