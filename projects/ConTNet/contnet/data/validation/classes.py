"""Checks that data sets have the classes of the model and of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode

from contnet.config.nodes import get_value
from contnet.data.datasets.classes import CLASS_KEYS, IMAGE_LABELS
from contnet.data.datasets.classification import ClassificationSource, count_labels
from contnet.data.datasets.register import find_source
from contnet.data.datasets.shards import CLASSES_FILE
from contnet.data.findings import Findings
from contnet.data.validation.examine import examine_coco
from contnet.utils.errors import UserError
from contnet.utils.text import describe_difference, first_names, plural

__all__ = ["check_classes", "count_classes"]


def check_classes(
    cfg: CfgNode, found: Mapping[str, Findings], trained: Sequence[str] | None = None
) -> None:
    """Adds errors if data sets have other classes than the model, or than each other.

    A data set that is only evaluated may have some of the model's classes, in any order.

    Args:
        cfg: MODEL and DATASETS are read.
        found: findings of all data sets of a run, by name.
        trained: class names of the weights to evaluate, empty if they are unknown; None for a
            training, whose model has the classes of its training sets.
    """
    keys = CLASS_KEYS.get(cfg.MODEL.META_ARCHITECTURE, {})
    first: dict[str, tuple[str, list[str]]] = {}
    for name, findings in found.items():
        for kind, classes in findings.classes.items():
            # If a model needs objects and label maps, each data set has one of the two.
            if keys and kind not in keys and (len(keys) == 1 or kind == IMAGE_LABELS):
                needs = " and ".join(keys)
                findings.error(f"it has {kind}, but {cfg.MODEL.META_ARCHITECTURE} requires {needs}")
                continue
            if not findings.named:
                _check_unnamed(cfg, keys.get(kind), len(classes), findings)
                continue
            earlier, expected = first.setdefault(kind, (name, classes))
            if trained and kind in keys:
                earlier, expected = "the weights", list(trained)
            by_name = trained or (trained is None and earlier in cfg.DATASETS.TRAIN)
            tests = trained is not None or name not in cfg.DATASETS.TRAIN
            if classes != expected and by_name and tests and _is_subset(classes, expected):
                _say_shared(classes, expected, earlier, findings)
                if kind in keys:
                    _check_number(cfg, keys[kind], len(expected), findings)
            elif classes != expected:
                findings.error(
                    f"its classes ({_shown(classes)}) are not those of {earlier} "
                    f"({_shown(expected)}): names and their order must agree, "
                    f"{describe_difference(classes, expected)}"
                )
            elif kind in keys:
                _check_number(cfg, keys[kind], len(classes), findings)
    for findings in found.values():
        if not findings.named and IMAGE_LABELS in first:
            findings.error(
                "its classes have no names, but those of "
                f"{first[IMAGE_LABELS][0]} have, so their order cannot be compared: write "
                f"{CLASSES_FILE} into its folder, one class per line in the order of the labels"
            )


def _is_subset(names: Sequence[str], expected: Sequence[str]) -> bool:
    """Whether all classes are among others and can be matched by name, because names are unique."""
    distinct = all(len(set(each)) == len(each) for each in (names, expected))
    return distinct and set(names) <= set(expected)


def _say_shared(
    classes: Sequence[str], expected: Sequence[str], whose: str, findings: Findings
) -> None:
    have = set(classes)
    if left := [name for name in expected if name not in have]:
        findings.warn(
            f"it has {len(classes)} of the {len(expected)} classes of {whose}: predictions of the "
            f"others are ignored ({first_names(left)})"
        )
    else:
        findings.note(f"its classes are those of {whose} in another order, matched by name")


def _shown(classes: Sequence[str]) -> str:
    return f"{len(classes)}: {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"


def _check_unnamed(cfg: CfgNode, key: str | None, number: int, findings: Findings) -> None:
    """Checks a set with labels but no names, whose last classes may have no images."""
    if key is None or get_value(cfg, key) == number:
        return
    said = f"its labels go up to {number - 1}, but {key} is {get_value(cfg, key)}"
    if get_value(cfg, key) < number:
        findings.error(f"{said}: set it to {number}")
    else:
        findings.note(said)


def _check_number(cfg: CfgNode, key: str, number: int, findings: Findings) -> None:
    node = get_value(cfg, key)
    if node != number:
        findings.error(f"it has {plural(number, 'class')}, but {key} is {node}: set it to {number}")


def count_classes(cfg: CfgNode, name: str) -> int:
    """Returns the number of classes of a data set of DATASETS.REGISTER, from its file or folder.

    Args:
        cfg: as for :func:`contnet.data.validation.examine.examine_coco`.
        name: name of the data set.

    Raises:
        UserError: if the file or folder cannot be read.
    """
    source = find_source(name)
    if isinstance(source, ClassificationSource):
        return count_labels(name, source)
    try:
        return len(examine_coco(cfg, name).findings.classes["objects"])
    except UserError as error:
        raise UserError(f"data set {name}: {error}") from error
