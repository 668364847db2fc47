"""Reads the losses of a step from the device once, and shares them with all processes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor

__all__ = ["read_from_all", "rows_not_finite"]


def read_from_all(rows: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """Reads numbers of all processes, with one exchange and one device synchronisation.

    Args:
        rows: rows of scalar tensors on one device; the shape is the same in all processes.

    Returns:
        Array (processes, rows, columns) of float64, the same in all processes.
    """
    table = torch.stack([torch.stack([value.detach().double() for value in row]) for row in rows])
    processes, shape = comm.get_world_size(), table.shape
    if processes > 1:
        tables = table.new_empty(processes * shape[0], shape[1])
        dist.all_gather_into_tensor(tables, table)
        table = tables
    return table.cpu().numpy().reshape(processes, *shape)


def rows_not_finite(values: np.ndarray) -> list[tuple[int, int]]:
    """Finds rows with numbers that are not finite.

    Args:
        values: (processes, rows).

    Returns:
        (rank, row) of the first such row of each rank that has one.
    """
    found = [np.flatnonzero(~np.isfinite(row)) for row in values]
    return [(rank, int(rows[0])) for rank, rows in enumerate(found) if len(rows)]
