"""Confidence intervals for the difference between two runs, by resampling images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["paired_interval"]


def paired_interval(
    measure: Callable[[np.ndarray], float], images: int, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Returns the difference, and the lower and upper end of its 95 % interval.

    Args:
        measure: computes the difference of two runs from weights (images,); image i counts
            ``weights[i]`` times.
        images: number of images.
        resamples: number of bootstrap resamples.
        seed: seed of the resampling; the same seed draws the same images.
    """
    rng = np.random.default_rng(seed)
    drawn = [
        measure(np.bincount(rng.integers(0, images, images), minlength=images))
        for _ in range(resamples)
    ]
    lower, upper = np.nanpercentile(drawn, [2.5, 97.5])
    return measure(np.ones(images, dtype=int)), float(lower), float(upper)
