"""The order of training images: one endless sequence per run, computable from any position.

In each epoch, every image occurs once, or as often as its repeat factor says. Landscape and
portrait images form a sequence each, which is cut into groups of equal size. An epoch consists of
the groups that become full in it, shuffled. A group may begin with images of earlier epochs, so no
image is left out. The number of groups before an epoch depends only on numbers of images, so
resuming does not replay anything.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator

import numpy as np

__all__ = ["ImageOrder"]

# Keys of random generators, besides those of streams 0 and 1.
_GROUPS, _OFFSETS = 100, 101


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


class _Stream:
    """The endless sequence of the images of one orientation.

    Args:
        images: indices of the images, ascending.
        repeats: how often each image occurs per epoch on average; None for once.
        seed: seed of the run.
        number: index of the stream.
    """

    def __init__(self, images: np.ndarray, repeats: np.ndarray | None, seed: int, number: int):
        self._images = images
        self._repeats = repeats
        self._offsets = None
        if repeats is not None:
            self._offsets = _generator(seed, _OFFSETS, number).random(len(images))
        self._seed = seed
        self._number = number

    def _times_before(self, epoch: int) -> np.ndarray:
        """Returns how often each image has occurred before an epoch, if images are repeated."""
        # The factor is rounded down or up in each epoch, so that the sum is off by less than 1.
        return np.floor(epoch * self._repeats + self._offsets)

    def count_before(self, epoch: int) -> int:
        """Returns the length of the sequence before an epoch."""
        if self._repeats is None:
            return epoch * len(self._images)
        return int(self._times_before(epoch).sum())

    def draw(self, epoch: int) -> np.ndarray:
        """Returns the images of an epoch, shuffled."""
        images = self._images
        if self._repeats is not None:
            times = self._times_before(epoch + 1) - self._times_before(epoch)
            images = images.repeat(times.astype(np.int64))
        return _generator(self._seed, self._number, epoch).permutation(images)

    def last_before(self, epoch: int, count: int) -> np.ndarray:
        """Returns the last ``count`` images before an epoch, which must exist."""
        parts = [self._images[:0]]
        while count > 0:
            epoch -= 1
            parts.append(self.draw(epoch)[-count:])
            count -= len(parts[-1])
        return np.concatenate(parts[::-1])


class ImageOrder:
    """An endless sequence of images that depends only on these arguments.

    Args:
        images: number of images.
        seed: seed of the run.
        group_size: images per group.
        landscape: whether each image is wider than tall, (N,); None for no groups.
        repeats: how often each image occurs per epoch on average, at least once, (N,); None for
            once.
    """

    def __init__(
        self,
        images: int,
        seed: int,
        group_size: int = 1,
        landscape: np.ndarray | None = None,
        repeats: np.ndarray | None = None,
    ):
        self.images = images
        self.seed = seed
        self.group_size = group_size if landscape is not None else 1
        self._landscape = landscape
        self._repeats = repeats
        everything = np.arange(images)
        parts = [everything]
        if self.group_size > 1:
            parts = [everything[landscape], everything[~landscape]]
        self._streams = [
            _Stream(part, None if repeats is None else repeats[part], seed, number)
            for number, part in enumerate(parts)
        ]

    def with_seed(self, seed: int) -> ImageOrder:
        """Returns the order of the same images for another seed."""
        return ImageOrder(self.images, seed, self.group_size, self._landscape, self._repeats)

    @property
    def images_per_epoch(self) -> float:
        """Number of images per epoch, on average if some are repeated."""
        return self.images if self._repeats is None else math.fsum(self._repeats)

    def _groups_before(self, epoch: int) -> int:
        return sum(stream.count_before(epoch) // self.group_size for stream in self._streams)

    def _epoch_of(self, group: int) -> int:
        """Returns the epoch in which a group becomes full."""
        size, length = self.group_size, self.images_per_epoch
        # A sum of rounded factors is off by less than 1 per image; a stream may carry over a group.
        slack = self.images + (len(self._streams) + 1) * size
        first = max(0, math.floor((group * size - slack) / length))
        last = math.ceil((group * size + slack) / length) + 1
        epochs = range(first, last)
        return first + bisect.bisect_right(epochs, group, key=self._groups_before) - 1

    def _draw(self, epoch: int, carried: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Returns the images of the groups that become full in an epoch, and those carried over.

        Args:
            epoch: number of the epoch.
            carried: the images that each stream carries over into the epoch.
        """
        groups, waiting = [], []
        for stream, before in zip(self._streams, carried, strict=True):
            images = np.concatenate([before, stream.draw(epoch)])
            full = len(images) // self.group_size * self.group_size
            groups.append(images[:full].reshape(-1, self.group_size))
            waiting.append(images[full:])
        if len(groups) == 1:  # one stream, already shuffled
            return groups[0].ravel(), waiting
        groups = np.concatenate(groups)
        order = _generator(self.seed, _GROUPS, epoch).permutation(len(groups))
        return groups[order].ravel(), waiting

    def images_from(self, position: int) -> Iterator[int]:
        """Yields the indices of the images from a position on, endlessly.

        Args:
            position: position in the sequence, from 0.
        """
        epoch = self._epoch_of(position // self.group_size)
        skip = position - self._groups_before(epoch) * self.group_size
        carried = [
            stream.last_before(epoch, stream.count_before(epoch) % self.group_size)
            for stream in self._streams
        ]
        for each in itertools.count(epoch):
            images, carried = self._draw(each, carried)
            yield from map(int, images[skip:])
            skip = 0
