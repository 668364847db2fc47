"""Top-1 and top-5 accuracy, exact over any number of processes."""

from __future__ import annotations

import logging

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

__all__ = ["ClassificationEvaluator"]

logger = logging.getLogger(__name__)

_RANKS = (1, 5)


class ClassificationEvaluator(DatasetEvaluator):
    """Counts images whose class is the first, or among the first five, of the logits.

    Each process counts the images that it saw; Detectron2's inference sampler gives every image to
    one process, so that the sums are those of the whole set.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.correct = dict.fromkeys(_RANKS, 0)
        self.images = 0
        self.broken = 0

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        logits = torch.stack([output["logits"] for output in outputs])
        labels = torch.tensor([each["label"] for each in inputs], device=logits.device)
        finite = logits.isfinite().all(dim=1)
        places = logits.topk(min(max(_RANKS), logits.shape[1])).indices == labels[:, None]
        places &= finite[:, None]
        for rank in _RANKS:
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
                for rank, number in zip(_RANKS, correct, strict=True)
            }
        }
