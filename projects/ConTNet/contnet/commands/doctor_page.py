"""Writes the doctor's page: images and targets as used in training, and data set statistics.

The images come from the training loader, with the same order, augmentation and random state. Each
is shown once as stored and several times as the network gets it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import BitMasks, BoxMode, Instances, PolygonMasks

from contnet.data.datasets.classes import dataset_class_names
from contnet.data.datasets.shards import sample_name
from contnet.data.findings import ERROR, Findings
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.images import read_labels, read_pixels
from contnet.data.pipeline.loader import build_train_loader
from contnet.data.validation.duplicates import find_near_duplicates, fingerprints
from contnet.data.validation.statistics import (
    DatasetStatistics,
    count_in_bins,
    read_statistics,
)
from contnet.evaluation.drawing import draw_prediction
from contnet.modeling.classifier import build_batch_augmentation
from contnet.report.page import Bars, Facts, Gallery, Notes, Section, Table, write_page
from contnet.report.pictures import ReportImage, shrink
from contnet.utils.text import plural

__all__ = ["write_doctor_page"]

_IMAGES, _TIMES = 8, 3
_SIDE = 480  # maximum side of a picture, in pixels
_GROUPS = 50  # maximum number of groups of similar images
_SHOWN = 6  # maximum number of names per group

_SIZES = (8, 16, 32, 64, 96, 192, 384, 768)
_OBJECTS = (1, 2, 3, 5, 9, 17, 33, 65)
_RATIOS = (0.1, 0.2, 0.33, 0.5, 0.8, 1.25, 2, 3, 5, 10)


# --- training images -----------------------------------------------------------------------------


def _masks(instances: Instances) -> np.ndarray | None:
    if not instances.has("gt_masks"):
        return None
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    return masks.tensor.numpy()


def _truth(inputs: Mapping) -> dict:
    """Returns the ground truth of a model input in the format for drawing."""
    if "sem_seg" in inputs:
        return {"semantic": inputs["sem_seg"].numpy()}
    if "label" in inputs:
        return {"classes": [inputs["label"]]}
    instances = inputs["instances"]
    truth = {
        "boxes": instances.gt_boxes.tensor.numpy(),
        "classes": instances.gt_classes.tolist(),
    }
    masks = _masks(instances)
    return truth if masks is None else {**truth, "masks": masks}


def _stored_truth(record: Mapping) -> dict:
    """Returns the ground truth of a record in the stored image; for objects, only boxes."""
    if "sem_seg_file_name" in record:
        return {"semantic": read_labels(record["sem_seg_file_name"]).astype(np.int64)}
    if "label" in record:
        return {"classes": [record["label"]]}
    objects = record["annotations"]
    boxes = [BoxMode.convert(each["bbox"], each["bbox_mode"], BoxMode.XYXY_ABS) for each in objects]
    return {
        "boxes": np.array(boxes, dtype=float).reshape(-1, 4),
        "classes": [each["category_id"] for each in objects],
    }


def _shrink(image: np.ndarray, truth: dict) -> tuple[np.ndarray, dict]:
    """Shrinks a large image and its ground truth before lines and labels are drawn."""
    image, scale = shrink(image, _SIDE)
    smaller, (height, width) = dict(truth), image.shape[:2]
    if "boxes" in truth:
        smaller["boxes"] = scale * truth["boxes"]
    for key in ("masks", "semantic"):
        if key in truth:
            rows, columns = (
                (np.arange(new) / scale).astype(int).clip(max=old - 1)
                for new, old in zip((height, width), truth[key].shape[-2:], strict=True)
            )
            smaller[key] = truth[key][..., rows[:, None], columns]
    return image, smaller


def _mix(cfg: CfgNode, batch: Sequence[dict]) -> Iterator[tuple[np.ndarray, dict]]:
    """Yields the images and targets of a batch after a classifier's batch augmentation."""
    mix, erase = build_batch_augmentation(cfg)
    mean, std = (
        torch.tensor(values).view(-1, 1, 1)
        for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    images = (torch.stack([each["image"] for each in batch]) - mean) / std
    labels = torch.tensor([each["label"] for each in batch])
    if erase is not None:
        images = erase(images)
    shares = torch.nn.functional.one_hot(labels, cfg.MODEL.CLASSIFIER.NUM_CLASSES).float()
    if mix is not None and len(batch) % 2 == 0:  # mixing needs pairs
        images, shares = mix(images, labels)
    pixels = (images * std + mean).round().clamp(0, 255).to(torch.uint8)
    for image, share in zip(pixels.permute(0, 2, 3, 1).numpy(), shares, strict=True):
        best = share.topk(min(2, len(share)))
        kept = best.values > 0.05  # smaller values come from label smoothing
        truth = {"classes": best.indices[kept].tolist(), "scores": best.values[kept].tolist()}
        yield np.ascontiguousarray(image), truth


def _fed(cfg: CfgNode, batch: Sequence[dict]) -> Iterator[tuple[np.ndarray, dict]]:
    """Yields the RGB images and ground truth of model inputs."""
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        yield from _mix(cfg, batch)
        return
    for inputs in batch:
        image = convert_image_to_rgb(inputs["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
        yield np.ascontiguousarray(image), _truth(inputs)


def _pictures(cfg: CfgNode, class_names: Sequence[str]) -> Gallery:
    """Draws some training images, as stored and as the network gets them."""

    def draw(image: np.ndarray, truth: dict) -> np.ndarray:
        return draw_prediction(*_shrink(image, truth), class_names)

    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = 0
    dicts = load_dataset_dicts(cfg, cfg.DATASETS.TRAIN, train=True)
    loader = build_train_loader(cfg, dicts, max(cfg.SEED, 0))
    order, seed = loader.batch_sampler.order.images_from(0), loader.batch_sampler.seed
    indices = list(dict.fromkeys(itertools.islice(order, 4 * _IMAGES)))[:_IMAGES]
    rows = []
    for index in indices:
        record = dicts[index]
        pixels = read_pixels(record, "RGB", cfg.INPUT.MAX_PIXELS)
        stored = draw(pixels, _stored_truth(record))
        rows.append((record, {f"stored, {pixels.shape[1]}x{pixels.shape[0]}": stored}))
    for time in range(_TIMES):
        # An image's random state depends only on its position in the order.
        batch = [loader.dataset[seed, time * _IMAGES + i, each] for i, each in enumerate(indices)]
        for (_, views), (image, truth) in zip(rows, _fed(cfg, batch), strict=True):
            views[f"input {time + 1}, {image.shape[1]}x{image.shape[0]}"] = draw(image, truth)
    return Gallery(
        "Training images",
        class_names,
        [
            ReportImage(Path(sample_name(record)).name, next(iter(views.values())), views)
            for record, views in rows
        ],
        note=f"The first images in training order: as stored, and {_TIMES} times as the network "
        "gets them, with augmentation.",
    )


# --- data sets -----------------------------------------------------------------------------------


def _bins(edges: Sequence[float], unit: str = "") -> list[str]:
    names = [f"{edge:.3g}" for edge in edges]
    inner = [f"{low} to {high}{unit}" for low, high in itertools.pairwise(names)]
    return [f"below {names[0]}{unit}", *inner, f"from {names[-1]}{unit}"]


def _counts(edges: Sequence[int]) -> list[str]:
    """Returns the names of bins of integers."""
    inner = [
        str(low) if high == low + 1 else f"{low} to {high - 1}"
        for low, high in itertools.pairwise(edges)
    ]
    return [str(edges[0] - 1), *inner, f"from {edges[-1]}"]


def _describe(name: str, found: DatasetStatistics) -> list[Section]:
    facts = {"images": found.images}
    if found.empty is not None:
        facts |= {"images without objects": found.empty, "objects": sum(found.objects)}
    unused = sum(not count for count in found.classes.values())
    facts["classes"] = f"{len(found.classes)}, {unused} of them without {found.counted}"
    charts = {}
    if found.classes:
        by_count = sorted(found.classes.items(), key=lambda item: -item[1])
        charts[f"{found.counted} of each class"] = by_count
    for what, values, edges, bins in (
        ("objects per image", found.objects, _OBJECTS, _counts(_OBJECTS)),
        ("sizes of objects (root of the box area)", found.sizes, _SIZES, _bins(_SIZES, " px")),
        ("aspect ratios (width / height) of objects", found.ratios, _RATIOS, _bins(_RATIOS)),
        ("aspect ratios (width / height) of images", found.image_ratios, _RATIOS, _bins(_RATIOS)),
    ):
        if values:
            charts[what] = list(zip(bins, count_in_bins(values, edges), strict=True))
    return [Facts(f"Data set {name}", facts), Bars(f"Statistics of {name}", charts)]


def _find_alike(cfg: CfgNode, records: Mapping[str, Sequence[dict]], workers: int) -> Table | Notes:
    """Finds near-duplicate images within and across data sets."""
    keys = ("file_name", "offset", "size")
    images, prints = [], []
    for name, dicts in records.items():
        files = [{key: each[key] for key in keys if key in each} for each in dicts]
        images += [(name, each.get("image_id"), sample_name(each)) for each in dicts]
        prints += fingerprints(files, cfg.INPUT.MAX_PIXELS, name, workers)
    heading, groups = "Near-duplicate images", find_near_duplicates(prints)
    if not groups:
        return Notes(heading, ["No near-duplicates were found."])
    rows = []
    for number, group in enumerate(groups[:_GROUPS], 1):
        members = [images[index] for index in group]
        names = [f"{name}: {file if id_ is None else id_}" for name, id_, file in members]
        sets = len({name for name, *_ in members})
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        rows.append((str(number), [len(group), sets, shown]))
    across = sum(len({images[index][0] for index in group}) > 1 for group in groups)
    return Table(
        heading,
        ["group", "images", "data sets", "ids or files"],
        rows,
        note=f"{plural(len(groups), 'group')}, {across} of them across data sets. Training images "
        "in a test set make its metrics too high. Copies, resized images and frames of one video "
        "are found by their grey values at 9x8 pixels; check them before you remove any. At most "
        f"{_GROUPS} groups are listed.",
    )


def _findings(found: Mapping[str, Findings], words: Mapping[str, Sequence[str]]) -> Notes:
    lines = [
        f"{word}  {name}: {line}"
        for word, severities in words.items()
        for name, findings in found.items()
        for severity in severities
        for line in findings.lines(severity)
    ]
    return Notes("What the doctor found", lines or ["No errors or notes."])


def write_doctor_page(
    path: Path,
    cfg: CfgNode,
    found: Mapping[str, Findings],
    words: Mapping[str, Sequence[str]],
    workers: int,
) -> Path:
    """Writes the page.

    Args:
        path: path of the page.
        cfg: config from :func:`contnet.launch.arguments.configure`.
        found: findings by data set.
        words: severities by the word that the page shows for them.
        workers: number of processes.

    Returns:
        The path of the page.
    """
    sections: list[Section] = [_findings(found, words)]
    broken = [name for name, findings in found.items() if findings.lines(ERROR)]
    whole = [name for name in found if name not in broken]
    records = {name: load_dataset_dicts(cfg, [name], train=False) for name in whole}
    class_names = dataset_class_names(cfg, whole)
    if broken:
        sections.append(
            Notes(
                "Data sets left out",
                [f"{name} has errors and cannot be loaded" for name in broken],
            )
        )
    if class_names and cfg.DATASETS.TRAIN and not set(broken) & set(cfg.DATASETS.TRAIN):
        sections.append(_pictures(cfg, class_names))
    for name, dicts in records.items():
        sections += _describe(name, read_statistics(dicts, class_names or []))
    if records:
        sections.append(_find_alike(cfg, records, workers))
    return write_page(path, "Data sets", sections)
