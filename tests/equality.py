"""Bit for bit comparison of what two training runs have saved."""

import torch

__all__ = ["equal"]


def equal(one: object, other: object) -> bool:
    """Returns whether two nested values are equal, and tensors in each of their values."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other
