"""Top-1 and top-5 accuracy, exact over any number of processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from contnet.utils.files import atomic_write, writing

__all__ = ["CLASSIFICATION_FILE", "ClassificationEvaluator", "top_ks"]

logger = logging.getLogger(__name__)

CLASSIFICATION_FILE = "classification.json"
_TOP_K = (1, 5)
# Keys of a record that locate its image; the last three are those of images in shards.
_PLACE = ("file_name", "image_id", "offset", "size")


def top_ks(num_classes: int) -> list[int]:
    """Returns the k of meaningful top-k accuracies: with five classes, top-5 is always 100 %."""
    return [k for k in _TOP_K if k < max(num_classes, 2)]


class ClassificationEvaluator(DatasetEvaluator):
    """Counts images whose class has the highest logit, or one of the five highest.

    Each process counts its own images; Detectron2's inference sampler gives each image to one
    process, so the sums are those of the whole data set.

    Args:
        classes: number of classes. With five or fewer, there is no top-5 accuracy.
        folder: folder for a file with the top five classes of each image; "" for none.
        names: class names, for that file.
    """

    def __init__(self, classes: int, folder: str = "", names: Sequence[str] | None = None):
        self.top_ks = top_ks(classes)
        self.folder = folder
        self.names = list(names or map(str, range(classes)))
        self.reset()

    def reset(self) -> None:
        self.correct = dict.fromkeys(self.top_ks, 0)
        self.images = 0
        self.broken = 0
        self.warnings: list[str] = []
        self._skipped: list[dict] = []
        self._best: list[tuple] = []  # facts and topk's result of each batch, on the device

    def skip(self, images: list[dict]) -> None:
        """Counts unreadable images as wrong."""
        self.images += len(images)
        if self.folder:
            self._skipped += [{**self._facts(each), "classes": [], "scores": []} for each in images]

    @staticmethod
    def _facts(image: dict) -> dict:
        return {key: image[key] for key in (*_PLACE, "label") if key in image}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        logits = torch.stack([output["logits"] for output in outputs])
        labels = torch.tensor([each["label"] for each in inputs])
        labels = labels.to(logits.device, non_blocking=True)
        finite = logits.isfinite().all(dim=1)
        hits = logits.topk(max(self.top_ks)).indices == labels[:, None]
        hits &= finite[:, None]
        # Read all counts together, because each read waits for the GPU.
        counts = torch.stack([(~finite).sum(), *(hits[:, :k].sum() for k in self.top_ks)])
        broken, *correct = counts.tolist()
        for k, count in zip(self.top_ks, correct, strict=True):
            self.correct[k] += count
        self.images += len(inputs)
        self.broken += broken
        if self.folder:
            most = min(max(_TOP_K), logits.shape[1])
            best = logits.float().softmax(dim=1).nan_to_num().topk(most)
            self._best.append((list(map(self._facts, inputs)), best))

    def _predictions(self) -> list[dict]:
        """The predictions of this process, a record for each image."""
        found = [
            {**facts, "classes": classes, "scores": [round(score, 5) for score in scores]}
            for batch, best in self._best
            for facts, classes, scores in zip(
                batch, best.indices.tolist(), best.values.tolist(), strict=True
            )
        ]
        return found + self._skipped

    def _write(self, parts: Sequence[list[dict]]) -> None:
        path = Path(self.folder, CLASSIFICATION_FILE)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        images = [image for part in parts for image in part]
        with atomic_write(path, "w") as file:
            json.dump({"class_names": self.names, "images": images}, file)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Returns accuracies in percent on the main process; elsewhere an empty dict."""
        counts = comm.gather([self.images, self.broken, *self.correct.values()])
        parts = comm.gather(self._predictions()) if self.folder else []
        if not comm.is_main_process():
            return {}
        if self.folder:
            self._write(parts)
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
