"""Intervals of a difference of two runs, by resampling images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["paired_interval"]


def paired_interval(
    measure: Callable[[np.ndarray], float], images: int, resamples: int, seed: int
) -> tuple[float, float, float]:
    """The difference, and the lower and upper end of its 95 % interval.

    Args:
        measure: the difference of two runs where image i counts ``weights[i]`` times, (images,).
        images: how many there are.
        resamples: how often as many images are drawn, with replacement.
        seed: of the draws, which are the same in each call.
    """
    rng = np.random.default_rng(seed)
    drawn = [
        measure(np.bincount(rng.integers(0, images, images), minlength=images))
        for _ in range(resamples)
    ]
    lower, upper = np.nanpercentile(drawn, [2.5, 97.5])
    return measure(np.ones(images, dtype=int)), float(lower), float(upper)
