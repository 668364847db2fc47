"""Annotations that were read once: by one process of a machine, and by one start of many.

What Detectron2 would parse in every process becomes a file of records in DATASETS.CACHE_DIR, which
the processes map. Its name has a digest of all that the records depend on: the bytes of every
annotation file, the paths, and the code that reads them. So there is no stale file, only one that
nobody looks for any more. What the checks of a data set found is kept in the same way.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import detectron2.data.datasets.cityscapes
import shapely
from cityscapesscripts.helpers import labels
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from contnet.data import findings
from contnet.data.datasets import coco as coco_records
from contnet.data.datasets.coco import make_records
from contnet.data.findings import ERROR, Findings
from contnet.data.pipeline import records as record_file
from contnet.data.pipeline.records import RecordFile, Records, write_records
from contnet.data.validation import cityscapes as cityscapes_checks
from contnet.data.validation import coco as coco_checks
from contnet.data.validation.cityscapes import check_layout
from contnet.data.validation.coco import Use, check_instances, class_names, read_instances
from contnet.utils.errors import UserError
from contnet.utils.files import TEMPORARY_SUFFIX, atomic_write

__all__ = [
    "Examined",
    "examine_cityscapes",
    "examine_coco",
    "load_records",
    "prepare_cityscapes",
    "sorted_scenes",
]

_PIECE = 1 << 20

logger = logging.getLogger(__name__)


# --- what records are made from ------------------------------------------------------------------


@functools.cache
def _code(*modules: ModuleType) -> str:
    """A digest of this code and of modules, so that other code does not find what they made."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for module in modules:
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def _digest_of(paths: Iterable[str | Path]) -> str:
    """Of the content of files, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
                while piece := file.read(_PIECE):
                    digest.update(piece)
        except OSError as error:
            raise UserError(
                f"the annotation file {path} cannot be read ({error.strerror})"
            ) from error
    return digest.hexdigest()


def _image_names(content: dict) -> list[str]:
    return [str(image.get("file_name")) for image in content["images"]]


@dataclass(frozen=True)
class _Coco:
    """A data set of Detectron2's ``register_coco_instances``."""

    json_file: str
    image_root: str
    makers = (record_file, coco_records, coco_checks)
    checkers = (coco_checks, findings)

    @property
    def label(self) -> str:
        return Path(self.json_file).stem

    def digest(self) -> str:
        return _digest_of([self.json_file])

    def versions(self) -> list[str]:
        return []

    def read(self) -> tuple[Iterable[dict], dict, list[str]]:
        return self.convert(read_instances(self.json_file))

    def convert(self, content: dict) -> tuple[Iterable[dict], dict, list[str]]:
        """Records of a file's content, what else a start wants to know, names of the images."""
        facts = {
            "classes": class_names(content),
            "ids": sorted(category["id"] for category in content["categories"]),
            "objects": len(content["annotations"]),
        }
        return make_records(content, self.image_root), facts, _image_names(content)


@dataclass(frozen=True)
class _Cityscapes:
    """A data set of Detectron2's ``register_all_cityscapes``."""

    name: str
    image_dir: str
    gt_dir: str
    kind: str
    makers = (record_file, labels, detectron2.data.datasets.cityscapes)
    checkers = (cityscapes_checks, labels, coco_checks, findings)

    @property
    def label(self) -> str:
        return f"{self.kind}_{Path(self.image_dir).name}"

    def digest(self) -> str:
        """Of the polygons, and of the names of all files."""
        files = {}
        for root in (self.image_dir, self.gt_dir):
            for city in sorted(os.listdir(root)):
                folder = os.path.join(root, city)
                files[folder] = sorted(os.listdir(folder)) if os.path.isdir(folder) else None
        polygons = [
            os.path.join(folder, name)
            for folder, names in files.items()
            for name in names or ()
            if name.endswith("_polygons.json")
        ]
        return hashlib.sha256(json.dumps([files, _digest_of(polygons)]).encode()).hexdigest()

    def versions(self) -> list[str]:
        return [shapely.__version__, shapely.geos_version_string]

    def read(self) -> tuple[Iterable[dict], dict, list[str]]:
        return sorted_scenes(DatasetCatalog.get(self.name)), {}, []


_Source = _Coco | _Cityscapes


def sorted_scenes(records: Iterable[dict]) -> list[dict]:
    """Records of Cityscapes by their names.

    Detectron2 lists folders, whose order is each file system's own: machines with copies of the
    data would otherwise not agree on which image is the tenth.
    """
    return sorted(records, key=lambda record: record["file_name"])


def _find_source(name: str) -> _Source | None:
    """What a name stands for; None unless a loader of Detectron2's that we know is behind it."""
    if name not in DatasetCatalog:
        return None
    loader, metadata = DatasetCatalog[name], MetadataCatalog.get(name)
    maker = (loader.__module__, getattr(loader, "__qualname__", "").partition(".")[0])
    if maker == ("detectron2.data.datasets.coco", "register_coco_instances"):
        return _Coco(metadata.json_file, metadata.image_root)
    if maker == ("detectron2.data.datasets.builtin", "register_all_cityscapes"):
        return _Cityscapes(name, metadata.image_dir, metadata.gt_dir, metadata.evaluator_type)
    return None


# --- the folder ----------------------------------------------------------------------------------


def _folder(cfg: CfgNode) -> Path | None:
    """Where annotations are kept; None for nowhere."""
    folder = cfg.DATASETS.CACHE_DIR
    if folder == "auto":
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        folder = os.path.join(home, "contnet")
    return Path(folder).expanduser().absolute() if folder else None


class _Cache:
    """What is kept of one data set, as its files are now.

    Args:
        folder: for all data sets.
        source: of this one.
    """

    def __init__(self, folder: Path, source: _Source):
        self.folder = folder
        self.source = source
        self.digest = source.digest()
        self.path = self._path("records", source.makers)

    def _path(self, ending: str, modules: Sequence[ModuleType], *more: object) -> Path:
        key = [self.digest, asdict(self.source), self.source.versions(), _code(*modules), *more]
        key = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return self.folder / f"{self.source.label}-{key[:24]}.{ending}"

    def _checks(self, use: Use) -> Path:
        return self._path("checks", self.source.checkers, asdict(use))

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

    def recall(self, use: Use) -> Findings | None:
        """What :meth:`remember` has written; None for anything else."""
        try:
            digest, _, state = self._checks(use).read_text(encoding="ascii").partition("\n")
        except (OSError, ValueError):
            return None
        if hashlib.sha256(state.encode()).hexdigest() != digest:
            return None
        return Findings.from_state(json.loads(state))

    def remember(self, use: Use, found: Findings) -> None:
        """Keeps what checks have found, unless that is an error, which is looked at anew."""
        if found.lines(ERROR):
            return
        state = json.dumps(found.state())
        try:
            with atomic_write(self._checks(use), "w") as file:
                file.write(f"{hashlib.sha256(state.encode()).hexdigest()}\n{state}")
        except OSError as error:
            self._tell_of(error)


def _open_cache(cfg: CfgNode, name: str) -> _Cache | None:
    folder, source = _folder(cfg), _find_source(name)
    return None if folder is None or source is None else _Cache(folder, source)


# --- what the checks and the loaders ask for -----------------------------------------------------


def _give_memory_back() -> None:
    """Has malloc return what parsing took; by itself it keeps hundreds of megabytes."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)


class Examined(NamedTuple):
    """What is known of an annotation file of COCO's form.

    Attributes:
        findings: of its checks.
        images: names of its images, as the file has them.
        objects: number of its annotations.
    """

    findings: Findings
    images: list[str]
    objects: int


def _examine(content: dict, use: Use) -> Examined:
    found = Findings()
    check_instances(content, use, found)
    return Examined(found, _image_names(content), len(content["annotations"]))


def _recall(cache: _Cache, use: Use) -> Examined | None:
    found = cache.recall(use)
    if found is None or not cache.has_records():
        return None
    file = RecordFile(cache.path)
    return Examined(found, file.names, file.facts["objects"])


def _examine_anew(cache: _Cache, use: Use, writable: bool) -> Examined:
    content = read_instances(cache.source.json_file)
    examined = _examine(content, use)
    sound = writable and not examined.findings.lines(ERROR)
    if sound and (cache.has_records() or cache.keep(*cache.source.convert(content))):
        cache.remember(use, examined.findings)
    return examined


def examine_coco(cfg: CfgNode, name: str) -> Examined:
    """Checks the annotation file of a data set, unless it has passed the same checks before.

    Its records are kept at the same time, so that the file is read once.

    Args:
        cfg: DATASETS, MODEL.MASK_ON and INPUT.MASK_FORMAT are read.
        name: of a data set of COCO's form.

    Raises:
        UserError: if the file cannot be read, or its categories cannot be used.
    """
    use = Use(
        trained=name in cfg.DATASETS.TRAIN,
        evaluated=name in cfg.DATASETS.TEST,
        masks=cfg.MODEL.MASK_ON,
        bitmasks=cfg.INPUT.MASK_FORMAT == "bitmask",
    )
    cache = _open_cache(cfg, name)
    if cache is None:
        return _examine(read_instances(MetadataCatalog.get(name).json_file), use)
    if known := _recall(cache, use):
        return known
    with cache.lock() as writable:
        if known := _recall(cache, use):  # from a process that was faster
            return known
        examined = _examine_anew(cache, use, writable)
    _give_memory_back()
    return examined


def examine_cityscapes(cfg: CfgNode, name: str) -> Findings:
    """Checks folders and polygons, unless the same ones have passed before.

    Args:
        cfg: DATASETS is read.
        name: of a data set in Cityscapes' layout, whose folders exist.
    """
    cache = _open_cache(cfg, name)
    trained = name in cfg.DATASETS.TRAIN
    use = Use(trained=trained, evaluated=False, masks=False, bitmasks=False)
    if cache and (found := cache.recall(use)):
        return found
    found, metadata = Findings(), MetadataCatalog.get(name)
    folders = metadata.image_dir, metadata.gt_dir
    check_layout(*folders, metadata.evaluator_type, found, trained)
    if cache and cache.source.digest() == cache.digest:
        with cache.lock() as writable:
            if writable:
                cache.remember(use, found)
    return found


def _prepare(cache: _Cache) -> Path | None:
    """Makes sure of the file of records; None where it cannot be written."""
    if cache.has_records():
        return cache.path
    with cache.lock() as writable:
        if cache.has_records():
            return cache.path
        kept = writable and cache.keep(*cache.source.read())
    _give_memory_back()
    return cache.path if kept else None


def prepare_cityscapes(cfg: CfgNode, names: Sequence[str]) -> None:
    """Keeps the records of data sets in Cityscapes' layout, before processes wait for them.

    Detectron2 reads the polygons in parallel, by the fewer processes the more ranks the run has.
    (Of COCO's form, the checks keep the records.)

    Args:
        cfg: DATASETS.CACHE_DIR is read.
        names: of data sets that have passed their checks; others than Cityscapes' are left out.
    """
    for name in names:
        cache = _open_cache(cfg, name) if isinstance(_find_source(name), _Cityscapes) else None
        if cache:
            _prepare(cache)


def _once_per_machine(function: Callable[[], object]) -> object:
    """Its result in the first process of this machine; all processes of the run call this."""
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


def _set_classes(name: str, facts: dict) -> None:
    """Tells the metadata what Detectron2's loader tells them."""
    metadata = MetadataCatalog.get(name)
    metadata.thing_classes = facts["classes"]
    metadata.thing_dataset_id_to_contiguous_id = {key: i for i, key in enumerate(facts["ids"])}


def load_records(cfg: CfgNode, name: str, usable: bool) -> Records | None:
    """The records of a data set, which all processes of a machine share.

    All processes of a run call this together. The first one of each machine reads the annotations,
    unless they have been read before.

    Args:
        cfg: DATASETS.CACHE_DIR is read.
        name: of the data set.
        usable: leave out images without objects, or with crowds alone.

    Returns:
        None where Detectron2 must load the data set itself: the folder is turned off or cannot be
        written, or the data set is of another kind.

    Raises:
        UserError: if the annotations cannot be read.
    """

    def prepare() -> Path | None:
        cache = _open_cache(cfg, name)
        return cache and _prepare(cache)

    path = _once_per_machine(prepare)
    if path is None:
        return None
    file = RecordFile(path)
    if "classes" in file.facts:
        _set_classes(name, file.facts)
    records = Records([file], usable)
    logger.info(f"{name}: {len(records)} of {len(file)} images, annotations from {path}")
    return records
