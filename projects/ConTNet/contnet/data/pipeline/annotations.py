"""A cache of parsed annotations, shared by all processes of a machine and by later runs.

What Detectron2 would parse in every process is stored as a file of records in DATASETS.CACHE_DIR,
which the processes map. The file's name has the number of the format and a digest of what the
records depend on: the bytes of the annotation files and the paths. So a file is never stale, only
unused; unused files are removed when the folder is full. The findings of a data set's checks are
cached in the same way.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n

from contnet.data.datasets.cityscapes import CityscapesSource, sorted_scenes
from contnet.data.datasets.coco import CocoSource
from contnet.data.datasets.register import find_source
from contnet.data.findings import ERROR, Findings
from contnet.data.pipeline.records import RecordFile, Records, write_records
from contnet.utils.cache import open_private, private_folder
from contnet.utils.errors import UserError
from contnet.utils.files import TEMPORARY_SUFFIX, atomic_write, explain_os_error

__all__ = [
    "AnnotationCache",
    "cache_cityscapes",
    "load_dataset_dicts",
    "open_cache",
    "release_memory",
]

# Must be increased if the same annotations would give other records or findings. Files of other
# formats are removed.
_FORMAT = 3
_FILE = re.compile(r".+-[0-9a-f]{24}(?:\.v(?P<format>\d+))?\.(?:records|checks)")
# Seconds for which a file is kept after its last use, because what a run has checked must exist
# when its processes start.
_SPARED = 3600
_LABEL = 100  # characters of a data set's name in a file name

logger = logging.getLogger(__name__)


def release_memory() -> None:
    """Returns memory to the system after parsing; malloc would keep hundreds of megabytes."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # only in glibc
        trim(0)


# --- the folder ----------------------------------------------------------------------------------


def _touch(path: Path) -> None:
    """Marks a file as used; in a folder that is not writable, nothing is removed anyway."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _remove_unused(path: Path) -> bool:
    """Removes a file unless a process has it open; returns whether it was removed."""
    try:
        with open_private(path, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning(f"{path} cannot be removed ({error.strerror or error})")
        return False
    return True


def _tell_of(folder: Path, error: OSError) -> None:
    """Warns, once per process, that nothing is cached in a folder, and why."""
    what = "is not used" if error.errno in (errno.EPERM, errno.ETIMEDOUT) else "cannot be written"
    message = (
        "Annotations are not cached, so each process reads them at each start: "
        f"{error.filename or folder} {what} ({explain_os_error(error, folder)}); fix that, or "
        "choose another DATASETS.CACHE_DIR"
    )
    log_first_n(logging.WARNING, message, key="message", name=__name__)


def _prune(folder: Path, limit: float) -> None:
    """Removes files of other formats, and while the folder is too large, the least recently used.

    Args:
        folder: the cache folder, which this process has locked.
        limit: maximum size in bytes.
    """
    files = []
    for path in folder.iterdir():
        name = _FILE.fullmatch(path.name)
        if name and name["format"] == str(_FORMAT):
            status = path.lstat()
            files.append((status.st_mtime, status.st_size, path))
        elif name:
            _remove_unused(path)
    excess = sum(size for _, size, _ in files) - limit
    for used, size, path in sorted(files):
        if excess <= 0 or time.time() - used < _SPARED:
            return
        if _remove_unused(path):
            excess -= size


class AnnotationCache:
    """The cached files of one data set, for the current state of its annotation files.

    Args:
        folder: cache folder for all data sets.
        source: source of this data set.
        limit: maximum size of the folder in bytes.

    Attributes:
        patience: seconds to wait for another process that has locked the folder.

    Raises:
        UserError: if the annotations cannot be read.
    """

    patience = 600.0  # COCO's take some minutes on a busy machine

    def __init__(self, folder: Path, source: CocoSource | CityscapesSource, limit: float):
        self.folder = folder
        self.source = source
        self.limit = limit
        self.digest = self._digest()
        self.path = self._path("records")

    def _digest(self) -> str:
        try:
            return self.source.digest()
        except OSError as error:
            raise UserError(
                f"the annotation file {error.filename} cannot be read ({error.strerror})"
            ) from error

    def _path(self, ending: str, *more: object) -> Path:
        key = hashlib.sha256(json.dumps([self.digest, *more]).encode()).hexdigest()
        return self.folder / f"{self.source.label[:_LABEL]}-{key[:24]}.v{_FORMAT}.{ending}"

    def is_current(self) -> bool:
        """Whether the annotations are unchanged since their digest was computed."""
        return self._digest() == self.digest

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Locks the folder for one process at a time; the lock of a process that dies is released.

        Yields False, after a warning in the log, if the folder cannot be written, or if another
        process does not release the lock.
        """
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context(open_private(self.folder / "lock", "a"))
                self._take(lock)
                for unfinished in self.folder.glob(f"*{TEMPORARY_SUFFIX}"):
                    unfinished.unlink(missing_ok=True)
            except OSError as error:
                _tell_of(self.folder, error)
                yield False
            else:
                yield True

    def _take(self, lock: IO) -> None:
        """Locks a file; raises TimeoutError if it stays locked for longer than ``patience``."""
        start, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                waited = time.monotonic() - start
            if waited > self.patience:
                reason = f"another process has locked it for {waited:.0f} s"
                raise TimeoutError(errno.ETIMEDOUT, reason, lock.name)
            if waited > 1 and not told:
                told = True
                print(
                    f"waiting for another process that reads annotations (it locks {lock.name}); "
                    f"after {self.patience / 60:.0f} minutes this process reads them itself",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(0.1)

    def recall_records(self) -> RecordFile | None:
        """Returns the file of records if it exists and is intact, otherwise None."""
        try:
            file = RecordFile.open_whole(self.path)
        except (FileNotFoundError, BlockingIOError):  # does not exist, or is being removed
            return None
        except OSError as error:
            _tell_of(self.folder, error)
            return None
        if file is None:
            logger.warning(f"{self.path} is damaged: the annotations are read again")
        else:
            _touch(self.path)
        return file

    def keep_records(self, content: object) -> RecordFile | None:
        """Writes the file of records; returns None, after a warning in the log, if that fails.

        Args:
            content: result of ``source.read``. This process has locked the folder.

        Raises:
            UserError: if the annotations have changed since their digest was computed, or
                Detectron2 could not load them.
        """
        if not self.is_current():
            raise UserError(
                f"the annotations {self.source.label} changed while they were read: start again"
            )
        try:
            write_records(self.path, *self.source.convert(content))
        except OSError as error:
            _tell_of(self.folder, error)
            return None
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"the annotations {self.source.label} cannot be loaded ({type(error).__name__}: "
                f"{error})"
            ) from error
        logger.info(f"The annotations {self.source.label} are cached in {self.path}")
        file = RecordFile(self.path)
        with contextlib.suppress(OSError):  # other processes may remove files, too
            _prune(self.folder, self.limit)
        return file

    def load_records(self) -> RecordFile | None:
        """Returns the file of records, after writing it if needed; None if that fails."""
        if file := self.recall_records():
            return file
        with self.lock() as writable:
            file = self.recall_records()  # another process may have written it
            if writable and file is None:
                file = self.keep_records(self.source.read())
        release_memory()
        return file

    def recall_findings(self, *key: object) -> Findings | None:
        """Returns the findings that :meth:`keep_findings` wrote for this key, otherwise None."""
        path = self._path("checks", *key)
        try:
            with open_private(path, "r", encoding="ascii") as file:
                digest, _, state = file.read().partition("\n")
        except (OSError, ValueError):
            return None
        if hashlib.sha256(state.encode()).hexdigest() != digest:
            return None
        _touch(path)
        return Findings.from_state(json.loads(state))

    def keep_findings(self, found: Findings, *key: object) -> None:
        """Stores the findings of checks, unless they have errors, which are checked again."""
        if found.lines(ERROR):
            return
        state = json.dumps(found.state())
        try:
            with atomic_write(self._path("checks", *key), "w") as file:
                file.write(f"{hashlib.sha256(state.encode()).hexdigest()}\n{state}")
        except OSError as error:
            _tell_of(self.folder, error)


def open_cache(cfg: CfgNode, name: str) -> AnnotationCache | None:
    """Opens the cache of a data set; returns None if it cannot be cached or caching is off.

    Args:
        cfg: DATASETS.CACHE_DIR and DATASETS.CACHE_SIZE_GB are read.
        name: name of the data set.

    Raises:
        UserError: if its annotations cannot be read.
    """
    folder, source = cfg.DATASETS.CACHE_DIR, find_source(name)
    if not folder or not isinstance(source, CocoSource | CityscapesSource):
        return None
    if folder == "auto":
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        folder = os.path.join(home, "contnet")
    folder = Path(folder).expanduser().absolute()
    try:
        folder = private_folder(folder)
    except OSError as error:
        _tell_of(folder, error)
        return None
    return AnnotationCache(folder, source, cfg.DATASETS.CACHE_SIZE_GB * 1e9 or float("inf"))


# --- the records ---------------------------------------------------------------------------------


def cache_cityscapes(cfg: CfgNode, names: Sequence[str]) -> None:
    """Caches the records of data sets in Cityscapes' layout before a run's processes need them.

    Detectron2 reads the polygons in parallel, with fewer processes the more ranks the run has. (The
    checks cache the records of data sets in COCO format.)

    Args:
        cfg: DATASETS is read.
        names: names of data sets that have passed their checks; only those in Cityscapes' layout
            are cached.
    """
    for name in names:
        if isinstance(find_source(name), CityscapesSource) and (cache := open_cache(cfg, name)):
            cache.load_records()


def _once_per_machine(function: Callable[[], object]) -> object:
    """Returns the result of this machine's first process; all processes of the run call this."""
    result = None
    if comm.get_local_rank() == 0:
        try:
            result = function()
        except Exception as error:  # raised below, in all processes
            result = error
    results = comm.all_gather(result)
    for each in results:
        if isinstance(each, Exception):
            raise each
    return results[comm.get_rank() - comm.get_local_rank()]


def _load_records(cfg: CfgNode, name: str, usable: bool) -> Records | None:
    """Returns the records of a data set, which all processes of a machine share.

    All processes of a run call this together. The first one of each machine reads the annotations,
    unless they are cached. ``usable`` leaves out images that have no objects, or only crowds.

    Returns:
        The records; None if Detectron2 must load the data set itself, because the cache is off or
        cannot be written, or the data set is of another kind.

    Raises:
        UserError: if the annotations cannot be read.
    """
    opened = []  # kept by the first process, so that no other run removes the file

    def prepare() -> str | None:
        cache = open_cache(cfg, name)
        opened.append(cache and cache.load_records())
        return opened[0] and opened[0].path

    path = _once_per_machine(prepare)
    if path is None:
        return None
    file = opened[0] if opened else RecordFile(path)
    if "classes" in file.facts:  # which Detectron2's loader would set
        metadata = MetadataCatalog.get(name)
        metadata.thing_classes = file.facts["classes"]
        ids = {key: i for i, key in enumerate(file.facts["ids"])}
        metadata.thing_dataset_id_to_contiguous_id = ids
    records = Records([file], usable)
    logger.info(f"{name}: {len(records)} of {len(file)} images, annotations from {path}")
    return records


def load_dataset_dicts(cfg: CfgNode, names: Sequence[str], train: bool) -> Sequence[dict]:
    """Loads data sets that have passed preflight; all processes call it together.

    Args:
        cfg: DATASETS and DATALOADER.FILTER_EMPTY_ANNOTATIONS are read.
        names: names of registered data sets.
        train: whether to leave out images without annotations, if the config says so.

    Returns:
        Detectron2's data set dicts: records that processes share if all of these data sets have
        them, otherwise a list.

    Raises:
        UserError: if a data set cannot be loaded.
    """
    filter_empty = train and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    every = []
    for name in names:
        try:
            dicts = _load_records(cfg, name, filter_empty)
            source = find_source(name)
            if dicts is None and isinstance(source, CityscapesSource) and not source.has_truth():
                dicts = source.read()
            elif dicts is None:
                dicts = get_detection_dataset_dicts(name, filter_empty=filter_empty)
                if isinstance(source, CityscapesSource):
                    dicts = sorted_scenes(dicts)
            every.append(dicts)
        except (AssertionError, LookupError, OSError, TypeError, ValueError) as error:
            raise UserError(
                f"data set {name} cannot be loaded ({type(error).__name__}: {error}): "
                "run python tools/doctor.py with this config for details"
            ) from error
    if every and all(isinstance(dicts, Records) for dicts in every):
        return Records([file for dicts in every for file in dicts.files], filter_empty)
    return [record for dicts in every for record in dicts]
