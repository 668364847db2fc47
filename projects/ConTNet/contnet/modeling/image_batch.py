"""A batch whose images are in one tensor, for models whose inputs all have the same size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import default_collate

__all__ = ["ImageBatch", "collate_images"]


class ImageBatch(Sequence):
    """A batch of Detectron2's inputs: one dict per image, whose ``image`` is a view of one tensor.

    A loader's worker sends this tensor as one file, instead of one file per image. It is pinned and
    copied to a GPU as a whole; DistributedDataParallel, which moves the items of lists one by one,
    leaves this copy to the model.

    Args:
        records: the other items of each image's dict.
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
        """Copies the batch to pinned memory; PyTorch's loader calls this."""
        return ImageBatch(self.records, self.images.pin_memory())


def collate_images(inputs: Sequence[dict]) -> ImageBatch:
    """Stacks the images of inputs, in shared memory in a worker.

    Args:
        inputs: one or more dicts, whose images have the same size.
    """
    records = [{k: v for k, v in each.items() if k != "image"} for each in inputs]
    return ImageBatch(records, default_collate([each["image"] for each in inputs]))
