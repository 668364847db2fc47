"""How far a resumed run has come, by which the records of its folder are cut back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Progress"]


@dataclass(frozen=True)
class Progress:
    """What a checkpoint has done.

    Attributes:
        iteration: the last one, as the checkpoint counts; -1 for none.
        images: that it has seen; None where that is not known.
        batch: images of an iteration from now on; 0 where the count stays as it is.
    """

    iteration: int
    images: int | None = None
    batch: int = 0

    def keeps(self, record: Mapping) -> bool:
        """Whether a record of metrics or results is of what the checkpoint has done."""
        seen = record.get("images_seen")
        if self.images is None or seen is None:
            return record["iteration"] <= self.iteration
        return seen <= self.images

    def recounted(self, record: Mapping) -> dict:
        """The record, with its iteration in batches of now."""
        seen = record.get("images_seen")
        if not self.batch or seen is None:
            return dict(record)
        return {**record, "iteration": max(int(seen) // self.batch - 1, 0)}
