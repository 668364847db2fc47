"""Top-1 and top-5 accuracy, exact over any number of processes."""

from __future__ import annotations

import logging

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

__all__ = ["ClassificationEvaluator", "top_ks"]

logger = logging.getLogger(__name__)

_TOP_K = (1, 5)


def top_ks(num_classes: int) -> list[int]:
    """The k of the top-k accuracies that mean something: of five classes top-5 is always right."""
    return [k for k in _TOP_K if k < max(num_classes, 2)]


class ClassificationEvaluator(DatasetEvaluator):
    """Counts images whose class is the first, or among the first five, of the logits.

    Each process counts the images that it saw; Detectron2's inference sampler gives every image to
    one process, so that the sums are those of the whole set.

    Args:
        classes: number of them. Top-5 accuracy is left out where there are no more than five.
    """

    def __init__(self, classes: int):
        self.top_ks = top_ks(classes)
        self.reset()

    def reset(self) -> None:
        self.correct = dict.fromkeys(self.top_ks, 0)
        self.images = 0
        self.broken = 0
        self.warnings: list[str] = []

    def skip(self, images: list[dict]) -> None:
        """Counts images that cannot be read: their class is not found."""
        self.images += len(images)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        logits = torch.stack([output["logits"] for output in outputs])
        labels = torch.tensor([each["label"] for each in inputs])
        labels = labels.to(logits.device, non_blocking=True)
        finite = logits.isfinite().all(dim=1)
        hits = logits.topk(max(self.top_ks)).indices == labels[:, None]
        hits &= finite[:, None]
        # Read at once: this process waits for a GPU each time.
        counts = torch.stack([(~finite).sum(), *(hits[:, :k].sum() for k in self.top_ks)])
        broken, *correct = counts.tolist()
        for k, count in zip(self.top_ks, correct, strict=True):
            self.correct[k] += count
        self.images += len(inputs)
        self.broken += broken

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Accuracies in percent, on the main process; elsewhere an empty dict."""
        counts = comm.gather([self.images, self.broken, *self.correct.values()])
        if not comm.is_main_process():
            return {}
        images, broken, *correct = (sum(column) for column in zip(*counts, strict=True))
        if broken:
            self.warnings = [f"{broken} of {images} images have logits that are not finite"]
            logger.warning(self.warnings[0])
        return {
            "classification": {
                f"top{k}": 100 * number / images
                for k, number in zip(self.top_ks, correct, strict=True)
            }
        }
