"""Analyses the pixel counts of segmenters that an evaluation has written to disk."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from contnet.analysis.bootstrap import paired_interval
from contnet.analysis.galleries import GallerySettings, choose_images, with_pixels
from contnet.analysis.tables import difference_table
from contnet.data.pipeline.images import read_labels, read_pixels
from contnet.evaluation.cityscapes import CITYSCAPES_COLOURS, label_indices
from contnet.report.page import Facts, Gallery, Matrix, Notes, Section, Table
from contnet.report.pictures import ReportImage
from contnet.utils.errors import UserError

__all__ = ["SegmentationData", "segmentation_sections"]

_OPACITY = 0.6  # opacity of the class colours over the image
_NONE = "nothing"


@dataclass(frozen=True)
class SegmentationData:
    """Folders of the images and the ground truth of a data set.

    Attributes:
        images: folder of images.
        truth: folder of label files.
    """

    images: Path
    truth: Path

    def image_of(self, truth: str) -> Path:
        """Returns the image of a label file."""
        return self.images / truth.replace("_gtFine_labelIds.png", "_leftImg8bit.png")


@dataclass(frozen=True)
class _Counts:
    """A run's pixel counts.

    Attributes:
        names: class names.
        files: label files.
        pixels: counts (N, C, C + 1) by file, true class and predicted class; the last column counts
            pixels without a prediction.
    """

    names: list[str]
    files: list[str]
    pixels: np.ndarray


def _read(file: Path) -> _Counts:
    try:
        with np.load(file, allow_pickle=False) as content:
            names, files = content["class_names"].tolist(), content["truth"].tolist()
            pixels = content["counts"]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
    if pixels.shape != (len(files), len(names), len(names) + 1) or not files:
        raise UserError(f"{file} has counts of the shape {pixels.shape}: evaluate again")
    return _Counts(names, files, pixels.astype(np.int64))


def _iou(pixels: np.ndarray) -> np.ndarray:
    """Returns the IoU (..., C) in percent of counts (..., C, C + 1); NaN for absent classes."""
    right = np.diagonal(pixels, axis1=-2, axis2=-1)
    union = pixels.sum(axis=-1) + pixels[..., :-1].sum(axis=-2) - right
    return 100 * np.divide(right, union, out=np.full(right.shape, np.nan), where=union > 0)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _difference(first: _Counts, other: _Counts, resamples: int, seed: int) -> tuple:
    """Returns the difference of the mean IoU and its interval."""

    def measure(weights: np.ndarray) -> float:
        first_sum, other_sum = (
            np.tensordot(weights, each.pixels, axes=1) for each in (first, other)
        )
        return _mean(_iou(other_sum)) - _mean(_iou(first_sum))

    return paired_interval(measure, len(first.files), resamples, seed)


def _matrix(name: str, counts: _Counts) -> Matrix:
    total = counts.pixels.sum(axis=0)
    shares = np.rint(100 * total / total.sum(axis=1, keepdims=True).clip(1)).astype(int)
    columns = [*counts.names, _NONE]
    if not shares[:, -1].any():
        columns, shares = counts.names, shares[:, :-1]
    note = "Percentages of the pixels of each true class."
    return Matrix(f"Confusion: {name}", "truth \\ predicted", counts.names, columns, shares, note)


def _painted(image: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Paints the colours of classes (H, W) over an image; 255 stands for no class."""
    known = classes < len(CITYSCAPES_COLOURS)
    colours = CITYSCAPES_COLOURS[np.where(known, classes, 0)]
    mixed = (1 - _OPACITY) * image + _OPACITY * colours
    return np.where(known[..., None], mixed, image).astype(np.uint8)


def _gallery(
    name: str,
    counts: _Counts,
    data: SegmentationData,
    predict: Callable[[np.ndarray], np.ndarray],
    settings: GallerySettings,
) -> Section:
    values = [_mean(each) for each in _iou(counts.pixels)]
    order = {i: 100 - value for i, value in enumerate(values) if not np.isnan(value)}
    worst, _ = choose_images(order, order, settings.images)
    best = sorted(set(order) - set(worst), key=lambda i: order[i])[: -(-settings.images // 3)]
    images = []
    for i in [*worst, *best]:
        path = data.image_of(counts.files[i])
        pixels = read_pixels({"file_name": str(path)}, "RGB", settings.max_pixels)
        truth = label_indices(read_labels(str(data.truth / counts.files[i]), settings.max_pixels))
        present = np.flatnonzero(counts.pixels[i].sum(axis=1))
        image = ReportImage(
            name=path.name,
            image=np.zeros((1, 1, 3), np.uint8),
            views={
                "Truth": _painted(pixels, truth),
                "Prediction": _painted(pixels, predict(pixels)),
            },
            note=f"mean IoU of its classes {values[i]:.1f}",
            classes=[counts.names[k] for k in present],
        )
        images.append(with_pixels(image, pixels, settings.side))
    note = "Sorted by the mean IoU of the classes in each image; the colours are Cityscapes'."
    return Gallery(f"Worst and best images: {name}", [], images, note)


def _class_table(title: str, counts: Mapping[str, _Counts]) -> Table:
    values = {name: _iou(each.pixels.sum(axis=0)) for name, each in counts.items()}
    names = dict.fromkeys(label for each in counts.values() for label in each.names)
    rows = []
    for label in names:
        cells = []
        for name, each in counts.items():
            known = label in each.names
            value = values[name][each.names.index(label)] if known else np.nan
            cells.append("n/a" if np.isnan(value) else f"{value:.2f}")
        rows.append((label, cells))
    return Table(f"IoU by class: {title}", ["class", *counts], rows)


def segmentation_sections(
    title: str,
    files: Mapping[str, Path],
    data: SegmentationData,
    predictors: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    resamples: int,
    seed: int,
    gallery: GallerySettings,
) -> list[Section]:
    """Returns sections about the label maps that runs have predicted for one data set.

    Args:
        title: name of the data set.
        files: files of pixel counts, by name of the run.
        data: folders of images and ground truth.
        predictors: by run, a function from an RGB image (H, W, 3) to its classes (H, W); runs
            without one have no images.
        resamples, seed: number of resamples and seed of the bootstrap.
        gallery: number and size of the images.
    """
    found: dict[str, _Counts] = {}
    notes: list[str] = []
    for name, file in files.items():
        try:
            found[name] = _read(file)
        except UserError as error:
            notes.append(f"{name}: {error}")
    if not found:
        return [Notes(f"Left out: {title}", notes)]
    facts = {f"mean IoU of {n}": _mean(_iou(each.pixels.sum(axis=0))) for n, each in found.items()}
    sections: list[Section] = [Facts(f"Label maps of the last evaluation: {title}", facts)]
    first = next(iter(found))
    differences = {}
    for name, each in found.items():
        if name != first and (each.files, each.names) == (found[first].files, found[first].names):
            differences[name] = {"mean IoU": _difference(found[first], each, resamples, seed)}
        elif name != first:
            notes.append(f"{name} has other images or classes than {first}: no difference")
    if differences:
        sections.append(difference_table(title, first, differences, resamples, seed))
    sections.append(_class_table(title, found))
    sections += [_matrix(name, each) for name, each in found.items()]
    for name in [name for name in found if name in predictors]:
        try:
            sections.append(_gallery(name, found[name], data, predictors[name], gallery))
        except UserError as error:
            notes.append(f"Images of {name}: {error}")
    if notes:
        sections.append(Notes(f"Left out: {title}", notes))
    return sections
