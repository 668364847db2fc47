"""A batch whose images lie in one tensor, for models whose inputs all have one size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import default_collate

__all__ = ["ImageBatch", "collate_images"]


class ImageBatch(Sequence):
    """Detectron2's inputs, a dict for each image, whose ``image`` is a view of one tensor.

    A loader's worker sends that tensor, and so one file, where it sends one for each image of a
    list. It is pinned and copied to a GPU as a whole: DistributedDataParallel, which moves what is
    in lists piece by piece, leaves this to the model.

    Args:
        records: what belongs to each image.
        images: (N, C, H, W).
    """

    def __init__(self, records: Sequence[dict], images: Tensor):
        self.records = records
        self.images = images

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return {**self.records[index], "image": self.images[index]}

    def pin_memory(self) -> ImageBatch:
        """The same in memory that a GPU copies from by itself; PyTorch's loader asks for it."""
        return ImageBatch(self.records, self.images.pin_memory())


def collate_images(inputs: Sequence[dict]) -> ImageBatch:
    """Stacks the images of inputs, in shared memory if this is a worker.

    Args:
        inputs: one or more, whose ``image`` have one size.
    """
    records = [{k: v for k, v in each.items() if k != "image"} for each in inputs]
    return ImageBatch(records, default_collate([each["image"] for each in inputs]))
