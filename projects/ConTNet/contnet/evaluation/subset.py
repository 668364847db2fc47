"""Evaluates a model on a data set with some of its classes, matched by name."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from torch import Tensor

from contnet.utils.errors import UserError
from contnet.utils.text import first_names

__all__ = ["SharedClasses", "share_classes"]

logger = logging.getLogger(__name__)


class SharedClasses(DatasetEvaluator):
    """Converts predictions to the class numbers of the evaluator's data set, and drops the others.

    Args:
        evaluator: evaluator of the data set.
        numbers: the model's index of each class of the data set.
        classes: number of the model's classes.
    """

    def __init__(self, evaluator: DatasetEvaluator, numbers: Sequence[int], classes: int):
        self._evaluator = evaluator
        self._columns = torch.tensor(numbers)
        self._numbers = torch.full((classes,), -1)
        self._numbers[self._columns] = torch.arange(len(numbers))

    def _instances(self, found: Instances) -> Instances:
        numbers = self._numbers.to(found.pred_classes.device)[found.pred_classes]
        kept = found[numbers >= 0]
        kept.pred_classes = numbers[numbers >= 0]
        return kept

    def _scores(self, scores: Tensor) -> Tensor:
        return scores[self._columns.to(scores.device)]

    def reset(self) -> None:
        self._evaluator.reset()

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Passes on ``instances``, ``logits`` (classes,) and ``sem_seg`` (classes, H, W)."""
        change = {"instances": self._instances, "logits": self._scores, "sem_seg": self._scores}
        kept = [
            {name: change.get(name, lambda value: value)(value) for name, value in output.items()}
            for output in outputs
        ]
        self._evaluator.process(inputs, kept)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Returns the evaluator's metrics."""
        return self._evaluator.evaluate()


def share_classes(
    evaluator: DatasetEvaluator,
    name: str,
    ours: Sequence[str] | None,
    theirs: Sequence[str] | None,
) -> DatasetEvaluator:
    """Makes an evaluator match classes by name, if the model's and the data set's classes differ.

    Args:
        evaluator: evaluator of the data set.
        name: name of the data set.
        ours: names of the model's classes, in order; None if they are unknown.
        theirs: names of the data set's classes, in order.

    Raises:
        UserError: if the data set has a class that the model lacks, or names are not unique.
    """
    if not ours or not theirs or list(ours) == list(theirs):
        return evaluator
    counts = (*Counter(ours).items(), *Counter(theirs).items())
    if double := [label for label, count in counts if count > 1]:
        raise UserError(
            f"data set {name} does not have the model's classes in their order, and they cannot be "
            f"matched by name: several are called {double[0]}, give them different names"
        )
    if missing := [label for label in theirs if label not in ours]:
        raise UserError(
            f"data set {name} has {len(missing)} of its {len(theirs)} classes that the model does "
            f"not know ({first_names(missing)}): evaluate on data with the model's classes"
        )
    left = [label for label in ours if label not in theirs]
    logger.info(
        f"data set {name} has {len(theirs)} of the model's {len(ours)} classes, by name"
        + (f"; detections of the others are ignored: {first_names(left)}" if left else "")
    )
    return SharedClasses(evaluator, [list(ours).index(label) for label in theirs], len(ours))
