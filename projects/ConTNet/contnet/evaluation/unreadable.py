"""Images that cannot be read in an evaluation: TEST.SKIP_UNREADABLE skips and counts them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from torch.utils.data import DataLoader

from contnet.data.datasets.shards import sample_name
from contnet.data.pipeline.loader import waiting_for_batch
from contnet.utils.errors import UserError

__all__ = ["CollateReadable", "MarkUnreadable", "ReadableBatches", "is_readable"]

_REASON = "unreadable"

logger = logging.getLogger(__name__)


def is_readable(image: dict) -> bool:
    """Whether a model input is readable, that is, not marked."""
    return _REASON not in image


class MarkUnreadable:
    """A mapper that marks records that cannot be loaded, instead of raising UserError.

    Args:
        mapper: converts a record to a model input.
    """

    def __init__(self, mapper: Callable[[dict], dict]):
        self.mapper = mapper

    def __call__(self, record: dict) -> dict:
        """Returns the mapper's output, or the marked record."""
        try:
            return self.mapper(record)
        except UserError as error:
            return {**record, _REASON: str(error)}


class CollateReadable:
    """Separates a batch of readable inputs from marked records.

    Args:
        collate: builds a batch of inputs.
    """

    def __init__(self, collate: Callable[[list[dict]], Sequence[dict]]):
        self.collate = collate

    def __call__(self, inputs: list[dict]) -> tuple[Sequence[dict], list[dict]]:
        """Returns the batch, empty if all are marked, and the marked records."""
        readable = [each for each in inputs if is_readable(each)]
        marked = [each for each in inputs if not is_readable(each)]
        return self.collate(readable) if readable else [], marked


class ReadableBatches:
    """The batches of a loader without marked images.

    Marked images are passed to the evaluator's method ``skip(images)``, which counts them as
    missed. An evaluator without this method gets no predictions for them, which is the same for
    COCO's AP.

    Args:
        cfg: config, of which DATALOADER and MODEL.DEVICE are read.
        loader: data loader; its mapper may be :class:`MarkUnreadable`, with
            :class:`CollateReadable`.
        evaluator: evaluator of the batches; None if nothing is measured.

    Attributes:
        skipped: files of this process's images that were skipped.
    """

    def __init__(self, cfg: CfgNode, loader: DataLoader, evaluator: DatasetEvaluator | None = None):
        self.cfg = cfg
        self.loader = loader
        self.evaluator = evaluator
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Sequence[dict]]:
        with waiting_for_batch(self.cfg):
            batches = iter(self.loader)
        while True:
            with waiting_for_batch(self.cfg):
                batch = next(batches, None)
            if batch is None:
                return
            readable, marked = batch
            if marked:
                self._skip(marked)
            if readable:
                yield readable

    def _skip(self, images: list[dict]) -> None:
        for image in images:
            logger.warning(f"Skipped, and counted as missed: {image[_REASON]}")
            self.skipped.append(sample_name(image))
        if hasattr(self.evaluator, "skip"):
            self.evaluator.skip(images)
