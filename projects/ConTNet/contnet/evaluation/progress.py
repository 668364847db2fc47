"""Progress of a checkpoint, to which a resumed run truncates its records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Progress"]


@dataclass(frozen=True)
class Progress:
    """The progress of a checkpoint.

    Attributes:
        iteration: its last iteration, counted in the checkpoint's batch size; -1 for none.
        images: number of images seen; None if it is unknown.
        batch: images per iteration from now on; 0 to keep the iterations of records.
    """

    iteration: int
    images: int | None = None
    batch: int = 0

    def keeps(self, record: Mapping) -> bool:
        """Whether a record of metrics or results is not after the checkpoint."""
        seen = record.get("images_seen")
        if self.images is None or seen is None:
            return record["iteration"] <= self.iteration
        return seen <= self.images

    def recounted(self, record: Mapping) -> dict:
        """Returns the record with its iteration recounted in the current batch size."""
        seen = record.get("images_seen")
        if not self.batch or seen is None:
            return dict(record)
        return {**record, "iteration": max(int(seen) // self.batch - 1, 0)}
