"""Checks annotations; findings are cached with the records, so unchanged files are checked once."""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple

from detectron2.config import CfgNode

from contnet.data.datasets.coco import CocoSource, image_names
from contnet.data.datasets.register import find_source
from contnet.data.findings import ERROR, Findings
from contnet.data.pipeline.annotations import AnnotationCache, open_cache, release_memory
from contnet.data.validation.cityscapes import check_layout
from contnet.data.validation.coco import DatasetUse, check_instances
from contnet.data.validation.images import FIRST, ListedImage, listed

__all__ = ["Examined", "dataset_use", "examine_cityscapes", "examine_coco"]


class Examined(NamedTuple):
    """What is known about an annotation file in COCO format.

    Attributes:
        findings: findings of its checks.
        images: names of its images, as written in the file.
        objects: number of its annotations.
        first: its first images, from :func:`contnet.data.validation.images.listed`.
    """

    findings: Findings
    images: list[str]
    objects: int
    first: list[ListedImage]


def _examine(source: CocoSource, content: dict, use: DatasetUse) -> Examined:
    found = Findings()
    check_instances(content, use, found)
    first = listed(source.image_root, content["images"][:FIRST])
    return Examined(found, image_names(content), len(content.get("annotations", ())), first)


def _recall(cache: AnnotationCache, use: DatasetUse) -> Examined | None:
    found = cache.recall_findings(asdict(use))
    if found is None or (file := cache.recall_records()) is None:
        return None
    records = [file[i] for i in range(min(FIRST, len(file)))]
    first = listed("", records)  # their file names are paths
    return Examined(found, file.names, file.facts["objects"], first)


def _examine_anew(cache: AnnotationCache, use: DatasetUse, writable: bool) -> Examined:
    content = cache.source.read()
    examined = _examine(cache.source, content, use)
    sound = writable and not examined.findings.lines(ERROR)
    if sound and (cache.recall_records() or cache.keep_records(content)):
        cache.keep_findings(examined.findings, asdict(use))
    return examined


def dataset_use(cfg: CfgNode, name: str) -> DatasetUse:
    """Returns how a config uses a data set.

    Args:
        cfg: DATASETS, DATALOADER, MODEL.MASK_ON and INPUT.MASK_FORMAT are read.
        name: name of the data set.
    """
    return DatasetUse(
        trained=name in cfg.DATASETS.TRAIN,
        evaluated=name in cfg.DATASETS.TEST,
        masks=cfg.MODEL.MASK_ON,
        bitmasks=cfg.INPUT.MASK_FORMAT == "bitmask",
        filtered=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
    )


def examine_coco(cfg: CfgNode, name: str) -> Examined:
    """Checks the annotation file of a data set, unless it has passed the same checks before.

    The records are cached at the same time, so that the file is read only once.

    Args:
        cfg: as for :func:`dataset_use`.
        name: name of a data set in COCO format.

    Raises:
        UserError: if the file cannot be read, or its categories cannot be used.
    """
    use = dataset_use(cfg, name)
    cache = open_cache(cfg, name)
    if cache is None:
        source = find_source(name)
        return _examine(source, source.read(), use)
    if known := _recall(cache, use):
        return known
    with cache.lock() as writable:
        if known := _recall(cache, use):  # another process was faster
            return known
        examined = _examine_anew(cache, use, writable)
    release_memory()
    return examined


def examine_cityscapes(cfg: CfgNode, name: str) -> Findings:
    """Checks folders and polygons, unless they have passed the same checks before.

    Args:
        cfg: DATASETS and DATALOADER are read.
        name: name of a data set in Cityscapes' layout, whose folders exist.
    """
    cache = open_cache(cfg, name)
    trained = name in cfg.DATASETS.TRAIN
    filtered = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    use = DatasetUse(trained, evaluated=False, masks=False, bitmasks=False, filtered=filtered)
    if cache and (found := cache.recall_findings(asdict(use))):
        return found
    found, source = Findings(), find_source(name)
    truth = source.has_truth()
    check_layout(source.image_dir, source.gt_dir, source.kind, found, trained, truth, filtered)
    if cache and cache.is_current():
        with cache.lock() as writable:
            if writable:
                cache.keep_findings(found, asdict(use))
    return found
