"""Finds near-duplicates: copies in another size or compression, frames of one video.

Each image is shrunk to 9x8 grey pixels. Comparing each pixel with its right neighbour gives a
fingerprint of 64 bits (a difference hash). Fingerprints of copies differ in few bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations

import numpy as np
from PIL import Image
from tqdm import tqdm

from contnet.data.pipeline.images import UnreadableFile, read_image
from contnet.utils.pools import process_pool

__all__ = ["find_near_duplicates", "fingerprint", "fingerprints"]

_BITS = 2  # maximum difference between the fingerprints of near-duplicates
_PARTS = 4  # of 16 bits; fingerprints that differ in fewer bits share at least one part
_MOST = 1000  # fingerprints with a common part; if there are more, only equal ones count


def fingerprint(record: dict, max_pixels: int) -> int | None:
    """Returns the fingerprint of an image; None if it cannot be read or has nearly one colour.

    Args:
        record: data set dict of the image.
        max_pixels: INPUT.MAX_PIXELS.
    """
    try:
        image = read_image(record, max_pixels)
    except UnreadableFile:
        return None
    pixels = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=int)
    if np.ptp(pixels) < 8:  # all such images look alike
        return None
    bits = (pixels[:, 1:] > pixels[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def fingerprints(
    records: Sequence[dict], max_pixels: int, name: str, workers: int
) -> list[int | None]:
    """Returns the fingerprints of images, with a progress bar in a terminal.

    Args:
        records: data set dicts of the images.
        max_pixels: INPUT.MAX_PIXELS.
        name: name of the data set.
        workers: number of processes.
    """
    function: Callable = partial(fingerprint, max_pixels=max_pixels)
    with process_pool(workers) as pool:
        found = pool.map(function, records, chunksize=max(1, min(128, len(records) // 8)))
        return list(tqdm(found, desc=f"{name}: near-duplicates", total=len(records), disable=None))


def find_near_duplicates(prints: Sequence[int | None]) -> list[list[int]]:
    """Groups near-duplicates.

    Args:
        prints: fingerprints of the images.

    Returns:
        Groups of two or more indices into ``prints``, the largest first. Each image of
        a group is a near-duplicate of at least one other, not of all.
    """
    parents = list(range(len(prints)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    same = defaultdict(list)
    for index, print_ in enumerate(prints):
        if print_ is not None:
            same[print_].append(index)
    buckets = defaultdict(list)
    for print_, indices in same.items():
        for index in indices[1:]:
            parents[root(index)] = root(indices[0])
        for part in range(_PARTS):
            buckets[part, print_ >> (16 * part) & 0xFFFF].append(print_)
    for alike in buckets.values():
        for one, other in combinations(alike, 2) if len(alike) <= _MOST else ():
            if (one ^ other).bit_count() <= _BITS:
                parents[root(same[other][0])] = root(same[one][0])
    groups = defaultdict(list)
    for index in range(len(prints)):
        groups[root(index)].append(index)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)
