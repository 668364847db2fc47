"""The folder where annotations are kept once they have been read, for other processes and runs.

What Detectron2 would parse in every process becomes a file of records in DATASETS.CACHE_DIR, which
the processes map. Its name has a digest of all that the records depend on: the bytes of every
annotation file, the paths, and the format. So there is no stale file, only one that nobody looks
for any more. What the checks of a data set found is kept in the same way.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from detectron2.config import CfgNode

from contnet.data.findings import ERROR, Findings
from contnet.data.pipeline.annotation_sources import AnnotationSource, find_source
from contnet.data.pipeline.records import RecordFile, write_records
from contnet.utils.errors import UserError
from contnet.utils.files import TEMPORARY_SUFFIX, atomic_write

__all__ = ["AnnotationCache", "open_cache", "release_memory"]

# Raise it when the same annotations would give other records.
_RECORDS_FORMAT = 1

logger = logging.getLogger(__name__)


def _folder(cfg: CfgNode) -> Path | None:
    """Where annotations are kept; None for nowhere."""
    folder = cfg.DATASETS.CACHE_DIR
    if folder == "auto":
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        folder = os.path.join(home, "contnet")
    return Path(folder).expanduser().absolute() if folder else None


def release_memory() -> None:
    """Has malloc return what parsing took; by itself it keeps hundreds of megabytes."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)


class AnnotationCache:
    """What is kept of one data set, as its files are now.

    Args:
        folder: for all data sets.
        source: of this one.
    """

    def __init__(self, folder: Path, source: AnnotationSource):
        self.folder = folder
        self.source = source
        self.digest = source.digest()
        self.path = self._path("records", _RECORDS_FORMAT)

    def _path(self, ending: str, *more: object) -> Path:
        key = [self.digest, asdict(self.source), self.source.versions(), *more]
        key = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return self.folder / f"{self.source.label}-{key[:24]}.{ending}"

    def has_records(self) -> bool:
        """Whether the file of records is there and whole."""
        if not self.path.exists():
            return False
        if RecordFile.is_whole(self.path):
            return True
        logger.warning(f"{self.path} is damaged: the annotations are read again")
        return False

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Lets one process at a time read and write; a process that dies lets go of it.

        Yields False, after a word in the log, where the folder cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(self.folder / "lock", "a"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.info(f"Waiting for the process that reads into {self.folder}")
                    fcntl.flock(lock, fcntl.LOCK_EX)
                for unfinished in self.folder.glob(f"*{TEMPORARY_SUFFIX}"):
                    unfinished.unlink(missing_ok=True)
            except OSError as error:
                self._tell_of(error)
                yield False
            else:
                yield True

    def _tell_of(self, error: OSError) -> None:
        logger.warning(
            f"The annotations {self.source.label} are not kept, so each process reads them, at "
            f"each start: {self.folder} cannot be written ({error.strerror or error}); choose "
            "another DATASETS.CACHE_DIR"
        )

    def keep(self, records: Iterable[dict], facts: dict, names: Sequence[str]) -> bool:
        """Writes the file of records; False, after a word in the log, where that is impossible.

        Raises:
            UserError: if the annotations are no longer those that the digest is of, or Detectron2
                could not load them.
        """
        if self.source.digest() != self.digest:
            raise UserError(
                f"the annotations {self.source.label} changed while they were read: start again"
            )
        try:
            write_records(self.path, records, facts, names)
        except OSError as error:
            self._tell_of(error)
            return False
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"the annotations {self.source.label} cannot be loaded ({type(error).__name__}: "
                f"{error})"
            ) from error
        logger.info(f"The annotations {self.source.label} are kept in {self.path}")
        return True

    def recall(self, *key: object) -> Findings | None:
        """What :meth:`remember` has written for this key; None for anything else."""
        try:
            digest, _, state = (
                self._path("checks", *key).read_text(encoding="ascii").partition("\n")
            )
        except (OSError, ValueError):
            return None
        if hashlib.sha256(state.encode()).hexdigest() != digest:
            return None
        return Findings.from_state(json.loads(state))

    def remember(self, found: Findings, *key: object) -> None:
        """Keeps what checks have found, unless that is an error, which is looked at anew."""
        if found.lines(ERROR):
            return
        state = json.dumps(found.state())
        try:
            with atomic_write(self._path("checks", *key), "w") as file:
                file.write(f"{hashlib.sha256(state.encode()).hexdigest()}\n{state}")
        except OSError as error:
            self._tell_of(error)


def open_cache(cfg: CfgNode, name: str) -> AnnotationCache | None:
    """What is kept of a data set; None where nothing can be, or the folder is turned off."""
    folder, source = _folder(cfg), find_source(name)
    return None if folder is None or source is None else AnnotationCache(folder, source)
