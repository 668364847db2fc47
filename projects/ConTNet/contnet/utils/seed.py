"""Random state as a function of what is computed, so that it need not be saved.

Every image of the training stream is augmented with a state made from (seed, its position), every
iteration is computed with one made from (seed, iteration, rank). Therefore, a resumed run draws the
same numbers as an uninterrupted one, whatever happened to the processes in between.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["keeping_random_state", "seed_everything"]


def seed_everything(*entropy: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's global generators from non-negative integers."""
    state = np.random.SeedSequence(entropy).generate_state(4, np.uint32)
    random.seed(int(state[0]))
    np.random.seed(state[1])
    torch.manual_seed(int(state[2]) << 32 | int(state[3]))


@contextlib.contextmanager
def keeping_random_state() -> Iterator[None]:
    """Context that restores the state of Python's, NumPy's and PyTorch's global generators."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
