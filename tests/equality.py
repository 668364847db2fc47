"""Whether what two trainings have left is equal, to the bit."""

import torch

__all__ = ["equal"]


def equal(one: object, other: object) -> bool:
    """Whether two nested values are equal; tensors by each of their numbers."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other
