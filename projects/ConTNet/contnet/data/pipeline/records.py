"""A file of data set records that processes share: written once, then memory-mapped.

The records come first, each packed by msgspec, followed by tables of numbers, a header, and at the
end the header's position and a SHA-256 of everything before it. What MessagePack has no type for is
stored as an extension type, so that a record is restored with the same values and types. Reading
does not execute code.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import itertools
import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from detectron2.structures import BoxMode
from msgspec import msgpack

from contnet.utils.cache import open_private
from contnet.utils.files import atomic_write

__all__ = ["RecordFile", "Records", "write_records"]

_MAGIC = b"records of contnet\n\0\0\0\0\0"
_END = struct.Struct("<Q32s")  # position of the header; digest
_FLOAT = np.dtype("<f8")
_COUNT = np.dtype("<i8")
_BYTE = np.dtype("u1")
_PIECE = 1 << 22
# Extension types of MessagePack.
_FLOATS, _TUPLE, _BOX_MODE, _LONG, _NO_UNICODE = range(1, 6)
_PLAIN = {str, bytes, int, float, bool, type(None)}


# --- one record ----------------------------------------------------------------------------------


def _extend(value: object) -> object:
    """Replaces lists of floats, and what MessagePack has no type for, by extensions."""
    kind = type(value)
    if kind is dict:
        return {key: _extend(each) for key, each in value.items()}
    if kind is list:
        if value and {float}.issuperset(map(type, value)):  # polygons, most of the data
            return msgpack.Ext(_FLOATS, np.asarray(value, _FLOAT).tobytes())
        return [_extend(each) for each in value]
    if kind is tuple:
        return msgpack.Ext(_TUPLE, _pack(list(value)))
    if kind is BoxMode:
        return msgpack.Ext(_BOX_MODE, bytes([value]))
    if kind is int and value.bit_length() > 63:
        return msgpack.Ext(_LONG, str(value).encode())
    if kind is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # a file name that is not valid Unicode
            return msgpack.Ext(_NO_UNICODE, value.encode(errors="surrogatepass"))
    if kind not in _PLAIN:  # msgspec would encode a set as a list and an enum as a number
        raise TypeError(f"a {kind.__name__} cannot be cached")
    return value


def _restore(code: int, data: memoryview) -> object:
    """Restores a value from an extension of :func:`_extend`."""
    if code == _FLOATS:
        return np.frombuffer(data, _FLOAT).tolist()
    if code == _TUPLE:
        return tuple(_unpack(data))
    if code == _BOX_MODE:
        return BoxMode(data[0])
    if code == _LONG:
        return int(bytes(data))
    return bytes(data).decode(errors="surrogatepass")


def _pack(value: object) -> bytes:
    """Packs a value of JSON's types, bytes, a tuple or a box mode as MessagePack.

    Raises:
        TypeError: for any other type.
    """
    return msgpack.encode(_extend(value))


_unpack = msgpack.Decoder(ext_hook=_restore).decode


def _is_usable(record: dict) -> bool:
    """Whether Detectron2 keeps an image when it filters those without annotations."""
    items = record.get("annotations")
    return items is None or any(item.get("iscrowd", 0) == 0 for item in items)


# --- the file ------------------------------------------------------------------------------------


class _Hashed:
    """Writes to a file, and hashes and counts what it writes."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._digest = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.position += len(data)

    def write_table(self, table: np.ndarray) -> list:
        """Writes a table at a multiple of 8 bytes; returns its position and shape."""
        self.write(bytes(-self.position % 8))
        place = self.position
        self.write(table.tobytes())
        return [place, list(table.shape)]

    def end(self, header: bytes) -> None:
        place = self.position
        self.write(header)
        self.write(place.to_bytes(8, "little"))
        self._file.write(self._digest.digest())


def write_records(
    path: Path, records: Iterable[dict], facts: dict, names: Sequence[str] = ()
) -> None:
    """Writes records in Detectron2's format to a file, atomically.

    Args:
        path: path of the file.
        records: data set dicts with ``width`` and ``height``; each is needed only until the next.
        facts: small additional data to store.
        names: a long list of strings to store.

    Raises:
        OSError: if the file cannot be written.
        TypeError: if a value cannot be packed.
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
            "names": file.write_table(np.frombuffer(_pack(names), _BYTE)),
        }
        file.end(_pack({"tables": tables, "facts": facts}))


class RecordFile(Sequence):
    """The records of a file, read on access; pickled as the file's path.

    The file stays locked, shared by all that have it open, as long as this object exists.

    Args:
        path: path of a complete file.

    Attributes:
        facts: see :func:`write_records`.
        sizes: width and height of each record's image, (N, 2).
        usable: indices of the records that remain when images without objects are filtered out.
    """

    def __init__(self, path: str | Path):
        self.path = os.fspath(path)
        with open_private(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the memory map keeps the lock
            self._view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        end = len(self._view) - _END.size
        place, _ = _END.unpack_from(self._view, end)
        header = _unpack(self._view[place:end])
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
        """The names that :func:`write_records` was given; a new list each time."""
        return _unpack(self._names)

    @classmethod
    def open_whole(cls, path: str | Path) -> RecordFile | None:
        """Opens a file if its digest matches its content, otherwise returns None.

        Raises:
            OSError: if the file does not exist, is not this user's, or is being removed.
        """
        with open_private(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            left = os.fstat(file.fileno()).st_size - hashlib.sha256().digest_size
            digest = hashlib.sha256()
            while left > 0 and (piece := file.read(min(_PIECE, left))):
                digest.update(piece)
                left -= len(piece)
            return cls(path) if left == 0 and file.read() == digest.digest() else None

    def __reduce__(self) -> tuple:
        return RecordFile, (self.path,)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, row: int) -> dict:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return _unpack(self._view[self._starts[row] : self._starts[row + 1]])


class Records(Sequence):
    """The records of one or several files, one after another, for Detectron2's loaders.

    The records are not in this process's own memory, so processes that open the same files share
    them. Every access returns a new dict.

    Args:
        files: the files, in order.
        usable: whether to leave out images that have no objects, or only crowds.
    """

    def __init__(self, files: Sequence[RecordFile], usable: bool):
        self.files = list(files)
        self._usable = usable
        self._ends = list(itertools.accumulate(map(self._count, self.files)))

    def _count(self, file: RecordFile) -> int:
        return len(file.usable if self._usable else file)

    def _find(self, index: int) -> tuple[RecordFile, int]:
        """Returns the file of a record, and the record's index in it."""
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

    @property
    def sizes(self) -> np.ndarray:
        """Width and height of each record's image in pixels, (N, 2)."""
        return np.concatenate(
            [file.sizes[file.usable] if self._usable else file.sizes for file in self.files]
        )
