"""Shards: tar files of labelled images in WebDataset format.

A folder contains ``NAME-000000.tar``, ``NAME-000001.tar`` and so on. Each sample of a shard has two
members, ``KEY.jpg`` (or another image extension) and ``KEY.cls``, the label as a number in text.
``classes.txt`` beside them has the class names, one per line, in the order of the labels.

Images are read by their offset in the tar file. ``index.npz`` stores the offsets; it is created if
it is missing, and a shard is indexed again if its size or time differs from the index.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from contnet.utils.cpus import available_cpus
from contnet.utils.errors import UserError
from contnet.utils.files import atomic_write, open_regular
from contnet.utils.pools import process_pool

__all__ = [
    "CLASSES_FILE",
    "INDEX_FILE",
    "MANIFEST_FILE",
    "SHARD_ENDING",
    "Shard",
    "index_shard",
    "read_classes",
    "read_index",
    "read_manifest",
    "read_sample",
    "sample_name",
    "shard_records",
    "write_index",
]

logger = logging.getLogger(__name__)

CLASSES_FILE = "classes.txt"
INDEX_FILE = "index.npz"
MANIFEST_FILE = "shards.json"  # written by tools/make_shards.py
SHARD_ENDING = ".tar"

_FORMAT = 1  # version of the index
_MOST_CLASSES = 10_000_000  # limit, because each class needs memory
_OPEN_FILES = 64  # per process
# WebDataset's rule: a key ends at the first dot after the last slash.
_MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)


@dataclass
class Shard:
    """The samples of one tar file, in its order.

    Attributes:
        name: name of the file.
        size: size of the file in bytes.
        mtime: modification time of the file in nanoseconds.
        keys: keys of the samples.
        offsets: offsets of the images in the file, in bytes.
        lengths: sizes of the images in bytes.
        labels: labels of the samples.
    """

    name: str
    size: int
    mtime: int
    keys: list[str]
    offsets: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


# ------------------------------------------------------------------------------
# One shard
# ------------------------------------------------------------------------------


def _read_label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> int:
    text = tar.extractfile(member).read(32)
    try:
        label = int(text)
    except ValueError:
        label = -1
    if not 0 <= label < _MOST_CLASSES:
        raise UserError(
            f"{path}: {member.name} contains {text!r}, it must be a label of at least 0 "
            f"and less than {_MOST_CLASSES}"
        )
    return label


def _put(found: dict, key: str, value: object, path: str, what: str) -> None:
    if key in found:
        raise UserError(f"{path}: the key {key!r} has two {what}: make the shard again")
    found[key] = value


def _pair(images: dict, labels: dict, path: str) -> None:
    if without := [key for key in images if key not in labels]:
        raise UserError(
            f"{path}: {len(without)} of {len(images)} images have no .cls file, such as "
            f"{without[0]!r}: it is not a shard of labelled images (unpack a tar file of one class "
            "into a folder of that class)"
        )
    if without := [key for key in labels if key not in images]:
        raise UserError(f"{path}: {without[0]!r} has a .cls but no image: make the shard again")


def index_shard(path: str) -> Shard:
    """Indexes a shard by its headers and labels.

    Raises:
        UserError: if the file is not a complete tar file of pairs of image and label.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        status = os.stat(path)
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                match = _MEMBER.fullmatch(member.name)
                if not match or not member.isreg() or member.issparse():
                    continue
                key, kind = match[1], match[2].lower()
                if f".{kind}" in IMG_EXTENSIONS:
                    place = (member.offset_data, member.size)
                    _put(images, key, place, path, "images")
                elif kind == "cls":
                    _put(labels, key, _read_label(tar, member, path), path, "labels")
            # tarfile treats a damaged header as the end.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it is truncated after {tar.offset} bytes")
    except UserError:
        raise
    except Exception as error:  # tarfile raises any exception on damaged headers, and recurses
        raise UserError(
            f"the shard {path} cannot be read ({error}): copy or make it again"
        ) from error
    _pair(images, labels, path)
    places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    numbers = np.array([labels[key] for key in images], dtype=np.int64)
    return Shard(
        *(os.path.basename(path), status.st_size, status.st_mtime_ns),
        *(list(images), places[:, 0], places[:, 1], numbers),
    )


# ------------------------------------------------------------------------------
# The index of a folder
# ------------------------------------------------------------------------------


def _to_bytes(texts: Iterable[str]) -> np.ndarray:
    return np.frombuffer(b"\0".join(map(os.fsencode, texts)), dtype=np.uint8)


def _to_texts(data: np.ndarray) -> list[str]:
    return [os.fsdecode(part) for part in data.tobytes().split(b"\0")] if data.size else []


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Writes ``index.npz``; processes that write it at the same time do not interfere."""
    own = folder / f"{INDEX_FILE}.{socket.gethostname()}.{os.getpid()}"
    with atomic_write(own) as file:
        np.savez(
            file,
            format=np.array(_FORMAT),
            names=_to_bytes(shard.name for shard in shards),
            files=np.array([(s.size, s.mtime, len(s.keys)) for s in shards]).reshape(-1, 3),
            keys=_to_bytes(key for shard in shards for key in shard.keys),
            offsets=np.concatenate([shard.offsets for shard in shards]),
            lengths=np.concatenate([shard.lengths for shard in shards]),
            labels=np.concatenate([shard.labels for shard in shards]),
        )
    os.replace(own, folder / INDEX_FILE)


def _stored(folder: Path) -> dict[str, Shard]:
    """Returns the content of ``index.npz`` by shard; empty if the file is missing or damaged."""
    try:
        with (
            open_regular(folder / INDEX_FILE) as stream,
            np.load(stream, allow_pickle=False) as file,
        ):
            if any(info.compress_type != zipfile.ZIP_STORED for info in file.zip.infolist()):
                raise ValueError("it is compressed")
            if file["format"] != _FORMAT:
                return {}
            names, keys = _to_texts(file["names"]), _to_texts(file["keys"])
            files = file["files"].tolist()
            columns = [file[name] for name in ("offsets", "lengths", "labels")]
            whole = [each.dtype == np.int64 and each.ndim == 1 for each in columns]
            if not all(whole) or file["files"].dtype != np.int64 or file["files"].shape[1:] != (3,):
                raise ValueError("its tables have another format")
    except FileNotFoundError:
        return {}
    except Exception as error:  # NumPy and zipfile raise any exception on damaged bytes
        logger.info(f"{folder / INDEX_FILE} is damaged ({error}) and is not used")
        return {}
    counts = [count for _, _, count in files]
    fits = min(counts, default=0) >= 0
    if (
        not fits
        or len(names) != len(files)
        or any(len(part) != sum(counts) for part in (keys, *columns))
    ):
        logger.info(f"{folder / INDEX_FILE} is damaged (its parts do not match) and is not used")
        return {}
    shards, start = {}, 0
    for name, (size, mtime, count) in zip(names, files, strict=True):
        part = slice(start, start + count)
        shard = Shard(name, size, mtime, keys[part], *(column[part] for column in columns))
        start += count
        if _is_possible(shard):
            shards[name] = shard
        else:
            logger.info(f"{folder / INDEX_FILE} has invalid numbers for {name}, which are not used")
    return shards


def _is_possible(shard: Shard) -> bool:
    """Whether all images lie within the file and all labels are valid."""
    low, high = shard.labels.min(initial=0), shard.labels.max(initial=0)
    return bool(
        (shard.offsets >= 0).all()
        and (shard.lengths >= 0).all()
        and (shard.offsets <= shard.size - shard.lengths).all()
        and low >= 0
        and high < _MOST_CLASSES
    )


_unwritten: dict[str, Shard] = {}  # by path: shards of folders that are not writable


def _is_fresh(shard: Shard | None, path: str) -> bool:
    status = os.stat(path)
    return shard is not None and (shard.size, shard.mtime) == (status.st_size, status.st_mtime_ns)


def _look(paths: Sequence[str], workers: int | None) -> list[Shard]:
    """Indexes shards, in processes if that saves time, with a progress bar in a terminal."""
    workers = min(workers or available_cpus(), len(paths))
    bar = partial(tqdm, total=len(paths), unit="shard", desc="index", disable=None)
    if workers == 1:
        return list(bar(map(index_shard, paths)))
    with process_pool(workers) as pool:
        return list(bar(pool.map(index_shard, paths)))


def read_index(folder: str, names: Sequence[str], workers: int | None = None) -> list[Shard]:
    """Returns the samples of a folder's shards, after indexing those that ``index.npz`` lacks.

    Args:
        folder: folder of the shards.
        names: file names of the shards, in order.
        workers: number of processes for indexing; None for the number of cores.

    Raises:
        UserError: if a shard cannot be used.
    """
    stored = _stored(Path(folder))
    paths = {name: os.path.join(folder, name) for name in names}
    known = {name: _unwritten.get(path, stored.get(name)) for name, path in paths.items()}
    try:
        todo = [name for name in names if not _is_fresh(known[name], paths[name])]
    except OSError as error:
        raise UserError(f"the shard {error.filename} cannot be read ({error.strerror})") from error
    if todo:
        logger.info(f"Indexing {len(todo)} of {len(names)} shards of {folder}")
        known.update(zip(todo, _look([paths[name] for name in todo], workers), strict=True))
    shards = [known[name] for name in names]
    if todo or set(stored) != set(names):
        try:
            write_index(Path(folder), shards)
        except OSError as error:
            logger.info(
                f"{folder}/{INDEX_FILE} cannot be written ({error.strerror}): it is kept in "
                "memory, and each new process indexes the shards again"
            )
            _unwritten.update((paths[shard.name], shard) for shard in shards)
    return shards


def shard_records(folder: str, shards: Sequence[Shard]) -> list[dict]:
    """Returns Detectron2's data set dicts of all samples, in the order of the shards.

    Returns:
        Dicts with ``file_name``, the tar file; ``offset`` and ``size`` of the image in it, in
        bytes; ``image_id``, the key, after the shard's name if keys occur twice; and ``label``.
    """
    keys = [key for shard in shards for key in shard.keys]
    double = len(set(keys)) < len(keys)
    records = []
    for shard in shards:
        path = os.path.join(folder, shard.name)
        prefix = f"{shard.name.removesuffix(SHARD_ENDING)}/" if double else ""
        columns = (shard.offsets.tolist(), shard.lengths.tolist(), shard.labels.tolist())
        records += [
            {
                "file_name": path,
                "image_id": prefix + key,
                "label": label,
                "offset": offset,
                "size": size,
            }
            for key, offset, size, label in zip(shard.keys, *columns, strict=True)
        ]
    return records


# ------------------------------------------------------------------------------
# Classes and images
# ------------------------------------------------------------------------------


def read_classes(folder: str) -> list[str] | None:
    """Returns the names in ``classes.txt``, in order; None if there is no such file.

    Raises:
        UserError: if the file cannot be read, or names are empty or occur twice.
    """
    path = Path(folder, CLASSES_FILE)
    try:
        with open_regular(path, "r", encoding="utf-8-sig", errors="surrogateescape") as file:
            text = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    names = text.removesuffix("\n").split("\n")
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"{path} must have one class per line, each once, and no empty line")
    return names


def read_manifest(folder: str) -> dict | None:
    """Returns the content of ``shards.json``, which tools/make_shards.py writes, or None.

    Raises:
        UserError: if the file is damaged.
    """
    path = Path(folder, MANIFEST_FILE)
    try:
        with open_regular(path, "r", encoding="utf-8") as file:
            stamp = json.load(file)
        if not isinstance(stamp["images"], int):
            raise TypeError("its number of images is not a number")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, RecursionError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): copy it again, or make the shards again"
        ) from error
    return stamp


class _Handle:
    """An open file that is closed when it is no longer used."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@lru_cache(maxsize=_OPEN_FILES)
def _open(path: str) -> _Handle:
    return _Handle(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))


def read_sample(record: dict) -> bytes:
    """Reads an image's bytes; forked processes may share the open files, which have no position.

    Args:
        record: record of :func:`shard_records`.

    Raises:
        OSError: if the shard cannot be read, or ends before the image does.
    """
    handle = _open(record["file_name"])
    data = os.pread(handle.number, record["size"], record["offset"])
    if len(data) < record["size"]:
        raise OSError(f"the shard ends {record['size'] - len(data)} bytes before the image does")
    return data


def sample_name(record: dict) -> str:
    """Returns an image's name for messages: its path, or its shard and key."""
    if "offset" in record:
        return f"{record['file_name']} key {record['image_id']}"
    return record["file_name"]
