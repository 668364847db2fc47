"""Top-1 and top-5 accuracy, exact over any number of processes."""

from __future__ import annotations

import logging

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

__all__ = ["ClassificationEvaluator", "ranks"]

logger = logging.getLogger(__name__)

_RANKS = (1, 5)


def ranks(classes: int) -> list[int]:
    """The k of the top-k accuracies that mean something: of five classes top-5 is always right."""
    return [rank for rank in _RANKS if rank < max(classes, 2)]


class ClassificationEvaluator(DatasetEvaluator):
    """Counts images whose class is the first, or among the first five, of the logits.

    Each process counts the images that it saw; Detectron2's inference sampler gives every image to
    one process, so that the sums are those of the whole set.

    Args:
        classes: number of them. Top-5 accuracy is left out where there are no more than five.
    """

    def __init__(self, classes: int):
        self.ranks = ranks(classes)
        self.reset()

    def reset(self) -> None:
        self.correct = dict.fromkeys(self.ranks, 0)
        self.images = 0
        self.broken = 0

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        logits = torch.stack([output["logits"] for output in outputs])
        labels = torch.tensor([each["label"] for each in inputs], device=logits.device)
        finite = logits.isfinite().all(dim=1)
        places = logits.topk(max(self.ranks)).indices == labels[:, None]
        places &= finite[:, None]
        for rank in self.ranks:
            self.correct[rank] += int(places[:, :rank].sum())
        self.images += len(inputs)
        self.broken += int((~finite).sum())

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Accuracies in percent, on the main process; elsewhere an empty dict."""
        counts = comm.gather([self.images, self.broken, *self.correct.values()])
        if not comm.is_main_process():
            return {}
        images, broken, *correct = (sum(column) for column in zip(*counts, strict=True))
        if broken:
            logger.warning(f"{broken} of {images} images have logits that are not finite")
        return {
            "classification": {
                f"top{rank}": 100 * number / images
                for rank, number in zip(self.ranks, correct, strict=True)
            }
        }
