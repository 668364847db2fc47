"""Images that cannot be read in an evaluation: TEST.SKIP_UNREADABLE leaves them out, and counts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from detectron2.evaluation import DatasetEvaluator
from torch.utils.data import DataLoader

from contnet.data.datasets.shards import sample_name
from contnet.utils.errors import UserError

__all__ = ["MarkUnreadable", "ReadableBatches"]

_REASON = "unreadable"

logger = logging.getLogger(__name__)


class MarkUnreadable:
    """A mapper that marks what it cannot load, where another one raises UserError.

    Args:
        mapper: makes a model input of a record.
    """

    def __init__(self, mapper: Callable[[dict], dict]):
        self.mapper = mapper

    def __call__(self, record: dict) -> dict:
        """What the mapper makes, or the marked record."""
        try:
            return self.mapper(record)
        except UserError as error:
            return {**record, _REASON: str(error)}


class ReadableBatches:
    """The batches of a loader without the images that are marked.

    These are given to the evaluator's method ``skip(images)``, which counts them as missed; where
    there is none, nothing is known of them, which is the same for COCO's AP.

    Args:
        loader: whose mapper is :class:`MarkUnreadable`.
        evaluator: of the batches.

    Attributes:
        skipped: files of this process's images that were left out.
    """

    def __init__(self, loader: DataLoader, evaluator: DatasetEvaluator):
        self.loader = loader
        self.evaluator = evaluator
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in self.loader:
            if marked := [image for image in batch if _REASON in image]:
                self._skip(marked)
            if readable := [image for image in batch if _REASON not in image]:
                yield readable

    def _skip(self, images: list[dict]) -> None:
        for image in images:
            logger.warning(f"Left out, and counted as missed: {image[_REASON]}")
            self.skipped.append(sample_name(image))
        if hasattr(self.evaluator, "skip"):
            self.evaluator.skip(images)
