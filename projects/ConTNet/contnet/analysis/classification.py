"""Analyses the predictions of classifiers that an evaluation has written to disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Required, TypedDict

import numpy as np

from contnet.analysis.bootstrap import paired_interval
from contnet.analysis.galleries import GallerySettings, build_gallery, choose_images
from contnet.analysis.tables import confusion_section, difference_table
from contnet.report.page import Facts, Notes, Section, Table
from contnet.report.pictures import ReportImage
from contnet.utils.errors import UserError
from contnet.utils.records import read_record

__all__ = ["classification_sections"]


# Keys that locate an image.
_PLACE = ("file_name", "image_id", "offset", "size")


class _Image(TypedDict, total=False):
    file_name: str
    image_id: int | str
    offset: int
    size: int
    label: Required[int]
    classes: Required[list[int]]
    scores: Required[list[float]]


class _File(TypedDict):
    class_names: list[str]
    images: list[_Image]


@dataclass(frozen=True)
class _Predictions:
    """A run's predictions, and the first predicted class of each image (-1 if there is none)."""

    names: list[str]
    images: list[_Image]
    labels: np.ndarray
    first: np.ndarray

    def hits(self, k: int) -> np.ndarray:
        return np.array([each["label"] in each["classes"][:k] for each in self.images])


def _read(file: Path) -> _Predictions:
    content = read_record(file, _File)
    if content is None or not content["images"]:
        raise UserError(f"{file} has no images: evaluate again (--eval-only)")
    names, images = content["class_names"], content["images"]
    images.sort(key=lambda each: (each.get("file_name", ""), str(each.get("image_id", ""))))
    numbers = {number for each in images for number in (each["label"], *each["classes"])}
    if not numbers <= set(range(len(names))):
        raise UserError(f"{file} has a class without a name: evaluate again (--eval-only)")
    first = [each["classes"][0] if each["classes"] else -1 for each in images]
    labels = np.array([each["label"] for each in images])
    return _Predictions(names, images, labels, np.array(first))


def _confusion(found: _Predictions) -> np.ndarray:
    """Counts images by true and first predicted class; the last column is for no prediction."""
    size = len(found.names)
    columns = np.where(found.first < 0, size, found.first)
    counts = np.zeros((size, size + 1), dtype=np.int64)
    np.add.at(counts, (found.labels, columns), 1)
    return counts


def _class_table(name: str, found: _Predictions, counts: np.ndarray) -> Table:
    rows = []
    for k, label in enumerate(found.names):
        total, right = counts[k].sum(), counts[k, k]
        wrong = counts[k, :-1].copy()
        wrong[k] = 0
        often = f"{found.names[wrong.argmax()]} ({wrong.max()})" if wrong.any() else ""
        top1 = f"{100 * right / total:.2f}" if total else "n/a"
        rows.append((label, [int(total), top1, often]))
    columns = ["class", "images", "top-1", "most often confused with"]
    return Table(f"By class: {name}", columns, rows)


def _gallery(name: str, found: _Predictions, settings: GallerySettings) -> Section:
    def score(each: _Image) -> float:
        return each["scores"][0] if each["scores"] else 0.0

    right = found.hits(1)
    errors = {i: 0 if right[i] else 1 + score(each) for i, each in enumerate(found.images)}
    size = {i: score(each) for i, each in enumerate(found.images)}
    worst, best = choose_images(errors, size, settings.images)
    images = []
    for i in [*worst, *best]:
        each = found.images[i]
        told = [
            f"{found.names[number]} {value:.2f}"
            for number, value in zip(each["classes"], each["scores"], strict=True)
        ]
        truth = found.names[each["label"]]
        images.append(
            ReportImage(
                name=str(each.get("image_id") or each.get("file_name", "")),
                image=np.zeros((1, 1, 3), np.uint8),
                views={},
                note=f"truth: {truth}; predicted: {', '.join(told) or 'nothing'}",
                classes=sorted({truth, *(found.names[k] for k in each["classes"][:1])}),
                errors=["right" if right[i] else "wrong"],
                place={key: each[key] for key in _PLACE if key in each},
            )
        )
    note = (
        "The wrong images with the highest probability of the wrong class, then the right images "
        "with the highest probability of the right class."
    )
    return build_gallery(f"Worst and best images: {name}", images, "", [], note, settings)


def _differences(
    first: _Predictions, other: _Predictions, resamples: int, seed: int
) -> dict[str, tuple[float, float, float]]:
    found = {}
    for k in (1, 5) if len(first.names) > 5 else (1,):
        gains = 100 * (other.hits(k).astype(float) - first.hits(k))

        def measure(weights: np.ndarray, gains: np.ndarray = gains) -> float:
            return float(weights @ gains / weights.sum())

        found[f"top{k}"] = paired_interval(measure, len(gains), resamples, seed)
    return found


def _same_images(first: _Predictions, other: _Predictions) -> bool:
    def keys(found: _Predictions) -> Sequence:
        return [(each.get("file_name"), each.get("image_id")) for each in found.images]

    return first.names == other.names and keys(first) == keys(other)


def classification_sections(
    title: str,
    files: Mapping[str, Path],
    resamples: int,
    seed: int,
    gallery: GallerySettings,
) -> list[Section]:
    """Returns sections about the classes that runs have predicted on one data set.

    Args:
        title: name of the data set.
        files: prediction files of the runs, by name of the run.
        resamples, seed: number of resamples and seed of the bootstrap.
        gallery: number and size of the images.
    """
    found, notes = {}, []
    for name, file in files.items():
        try:
            found[name] = _read(file)
        except UserError as error:
            notes.append(f"{name}: {error}")
    facts, differences = {}, {}
    first = next(iter(found), "")
    for name, each in found.items():
        for k in (1, 5) if len(each.names) > 5 else (1,):
            facts[f"top-{k} of {name}"] = 100 * float(each.hits(k).mean())
        if name != first and _same_images(found[first], each):
            differences[name] = _differences(found[first], each, resamples, seed)
        elif name != first:
            notes.append(f"{name} has other images or classes than {first}: no difference")
    sections: list[Section] = []
    if facts:
        sections.append(Facts(f"Classes of the last evaluation: {title}", facts))
    if differences:
        sections.append(difference_table(title, first, differences, resamples, seed))
    for name, each in found.items():
        counts = _confusion(each)
        sections.append(_class_table(name, each, counts))
        columns = [*each.names, "nothing"]
        if not counts[:, -1].any():
            columns, counts = each.names, counts[:, :-1]
        note = "Images by their true class and the first class that was predicted."
        sections.append(confusion_section(f"Confusion: {name}", each.names, columns, counts, note))
    sections += [_gallery(name, each, gallery) for name, each in found.items()]
    if notes:
        sections.append(Notes(f"Left out: {title}", notes))
    return sections
