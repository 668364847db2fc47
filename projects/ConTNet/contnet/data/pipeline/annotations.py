"""Loads data sets as records that all processes of a machine share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils import comm

from contnet.data.datasets.cityscapes import GT_FILES, sorted_scenes
from contnet.data.pipeline.annotation_cache import AnnotationCache, open_cache, release_memory
from contnet.data.pipeline.annotation_sources import CityscapesSource, find_source
from contnet.data.pipeline.records import RecordFile, Records
from contnet.utils.errors import UserError

__all__ = ["cache_cityscapes", "load_dataset_dicts", "load_records"]

logger = logging.getLogger(__name__)


def _prepare(cache: AnnotationCache) -> Path | None:
    """Makes sure of the file of records; None where it cannot be written."""
    if cache.has_records():
        return cache.path
    with cache.lock() as writable:
        if cache.has_records():
            return cache.path
        kept = writable and cache.keep(*cache.source.read())
    release_memory()
    return cache.path if kept else None


def cache_cityscapes(cfg: CfgNode, names: Sequence[str]) -> None:
    """Keeps the records of data sets in Cityscapes' layout, before processes wait for them.

    Detectron2 reads the polygons in parallel, by the fewer processes the more ranks the run has.
    (Of COCO's form, the checks keep the records.)

    Args:
        cfg: DATASETS.CACHE_DIR is read.
        names: of data sets that have passed their checks; others than Cityscapes' are left out.
    """
    for name in names:
        cache = open_cache(cfg, name) if isinstance(find_source(name), CityscapesSource) else None
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
        cache = open_cache(cfg, name)
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


def load_dataset_dicts(cfg: CfgNode, names: Sequence[str], train: bool) -> Sequence[dict]:
    """Loads data sets that have passed preflight; all processes call it together.

    Args:
        cfg: DATASETS.CACHE_DIR and DATALOADER.FILTER_EMPTY_ANNOTATIONS are read.
        names: of registered data sets.
        train: leave out images without annotations, if the config says so.

    Returns:
        Detectron2's data set dicts: records that processes share, where all of these data sets
        have such, otherwise a list.

    Raises:
        UserError: if one cannot be loaded.
    """
    filter_empty = train and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    every = []
    for name in names:
        try:
            dicts = load_records(cfg, name, filter_empty)
            if dicts is None:
                dicts = get_detection_dataset_dicts(name, filter_empty=filter_empty)
                if MetadataCatalog.get(name).get("evaluator_type") in GT_FILES:
                    dicts = sorted_scenes(dicts)
            every.append(dicts)
        except (AssertionError, LookupError, OSError, TypeError, ValueError) as error:
            raise UserError(
                f"data set {name} cannot be loaded ({type(error).__name__}: {error}): "
                "python tools/doctor.py with this config tells what is wrong"
            ) from error
    if every and all(isinstance(dicts, Records) for dicts in every):
        return Records([file for dicts in every for file in dicts.files], filter_empty)
    return [record for dicts in every for record in dicts]
