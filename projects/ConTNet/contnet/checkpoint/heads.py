"""Adapts heads to other classes: copies the weights of classes with the same name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, MaskRCNNConvUpsampleHead, ROIHeads
from torch import Tensor, nn

from contnet.modeling.classifier import ImageClassifier
from contnet.modeling.contnet import ConTNet
from contnet.modeling.pspnet import PSPHead
from contnet.utils.text import first_names

__all__ = ["ClassRows", "class_rows", "compare_names", "match_rows"]


@dataclass(frozen=True)
class ClassRows:
    """Layout of the first dimension of a head's tensor: groups x classes x width, then extra rows.

    Attributes:
        groups: number of anchors per location, each with its own rows for all classes.
        width: rows per class in a group.
        extra: rows after those of the classes, for the background.
    """

    groups: int = 1
    width: int = 1
    extra: int = 0

    def length(self, classes: int) -> int:
        """Returns the number of rows of a tensor for a number of classes."""
        return self.groups * classes * self.width + self.extra

    def _split(self, tensor: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Returns views of the class rows (groups, classes, width, ...) and of the extra rows."""
        count = self.length(classes) - self.extra
        shape = (self.groups, classes, self.width, *tensor.shape[1:])
        return tensor[:count].view(shape), tensor[count:]

    def take(
        self, fresh: Tensor, trained: Tensor, pairs: Sequence[tuple[int, int]], sizes: Sequence[int]
    ) -> Tensor:
        """Returns a copy of ``fresh`` with the trained rows of some classes, and of the background.

        Args:
            fresh: the tensor for the new classes.
            trained: the tensor for the file's classes.
            pairs: (new, old) indices of the same class.
            sizes: (new, old) numbers of classes.
        """
        made = fresh.clone()
        rows, extra = self._split(made, sizes[0])
        old_rows, old_extra = self._split(trained.to(fresh).contiguous(), sizes[1])
        new, old = (list(numbers) for numbers in zip(*pairs, strict=True))
        rows[:, new] = old_rows[:, old]
        extra.copy_(old_extra)
        return made


def _rows_of_boxes(module: FastRCNNOutputLayers) -> dict[str, ClassRows]:
    rows = {"cls_score": ClassRows(extra=1)}
    per_class, rest = divmod(module.bbox_pred.out_features, module.num_classes)
    # A class-agnostic head has rows for only one box.
    if not rest and per_class == len(module.box2box_transform.weights):
        rows["bbox_pred"] = ClassRows(width=per_class)
    return rows


def _parts(model: nn.Module) -> dict[str, ClassRows]:
    """Returns the layers of a model that depend on its classes, by name."""
    found = {}
    classes = {m.num_classes for m in model.modules() if isinstance(m, ROIHeads)}
    for name, module in model.named_modules():
        parts = {}
        if isinstance(module, FastRCNNOutputLayers):
            parts = _rows_of_boxes(module)
        elif isinstance(module, RetinaNetHead):  # also FCOS's head
            parts = {"cls_score": ClassRows(groups=module.bbox_pred.out_channels // 4)}
        elif isinstance(module, MaskRCNNConvUpsampleHead):
            parts = {"predictor": ClassRows()} if {module.predictor.out_channels} == classes else {}
        elif isinstance(module, SemSegFPNHead):
            parts = {"predictor": ClassRows()}
        elif isinstance(module, PSPHead):
            parts = {"classifier.2": ClassRows()}
            if module.aux_classifier is not None:
                parts["aux_classifier.2"] = ClassRows()
        found |= {f"{name}.{part}".removeprefix("."): rows for part, rows in parts.items()}
    return found


def class_rows(model: nn.Module) -> dict[str, ClassRows]:
    """Returns the tensors that depend on a model's classes, by full name; empty for a backbone."""
    if isinstance(model, ImageClassifier):
        return dict.fromkeys(model.head_names(), ClassRows())
    if isinstance(model, ConTNet):
        names = [name for name in model.state_dict() if name.startswith("head.")]
        return dict.fromkeys(names, ClassRows())
    parts = _parts(model)
    return {
        name: rows
        for name in model.state_dict()
        if (rows := parts.get(name.rpartition(".")[0])) is not None
    }


def _simple(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def compare_names(ours: Sequence[str], theirs: Sequence[str], path: str) -> str:
    """Returns a log line about the classes that a head copies from a file by name."""
    shared = [name for name in ours if name in theirs]
    new = [name for name in ours if name not in theirs]
    # Names that differ only in case, spaces or punctuation.
    alike = {_simple(name): name for name in theirs if _simple(name)}
    near = [f"{name} is {alike[_simple(name)]} there" for name in new if _simple(name) in alike]
    hint = f"; names must be equal ({first_names(near)})" if near else ""
    if not shared:
        return (
            f"head: none of the {len(ours)} classes is among the {len(theirs)} of {path}, so it "
            f"starts from random weights{hint}"
        )
    line = f"head: {len(shared)} of {len(ours)} classes copied by name from {path}"
    if new:
        line += f" ({first_names(shared)}), {len(new)} new: {first_names(new)}"
    return line + hint


def match_rows(
    rows: Mapping[str, ClassRows],
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    ours: Sequence[str],
    theirs: Sequence[str],
) -> dict[str, Tensor]:
    """Copies the file's rows of a head for classes with the same name.

    Args:
        rows: from :func:`class_rows`.
        own: the model's initial tensors.
        state: the file's tensors, by the model's names.
        ours: names of the model's classes, in order.
        theirs: names of the file's classes, in order.

    Returns:
        The tensors with at least one row from the file.
    """
    numbers: dict[str, int] = {}
    for number, name in enumerate(theirs):
        numbers.setdefault(name, number)
    pairs = [(i, numbers[name]) for i, name in enumerate(ours) if name in numbers]
    made = {}
    for name, layout in rows.items():
        fresh, trained = own[name], state.get(name)
        if not pairs or trained is None or trained.shape[1:] != fresh.shape[1:]:
            continue
        lengths = (layout.length(len(ours)), layout.length(len(theirs)))
        if (len(fresh), len(trained)) == lengths:
            made[name] = layout.take(fresh, trained, pairs, (len(ours), len(theirs)))
    return made
