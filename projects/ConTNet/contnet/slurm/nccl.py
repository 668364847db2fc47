"""Makes NCCL leave it to the job's watcher to report a rank that is gone or hangs."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

import torch

__all__ = ["leave_failures_to_watcher"]


def leave_failures_to_watcher(
    folder: Path, timeout: float, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Sets PyTorch's variables for NCCL, before a process group is created; keeps those set.

    By default, PyTorch's watchdog aborts the process at the first NCCL or CUDA error, before it
    can report the error or requeue the job. It must not abort communicators instead: the kernels
    would end, and the training would continue with gradients that were not reduced.

    Args:
        folder: folder of the attempt, for the flight recorder's files ``nccl-<rank>``.
        timeout: timeout of the process group in seconds, longer than the watcher's.
        environ: environment variables; changed in place.
    """
    wanted = {
        # No handling: a broken collective blocks, or raises in the main thread.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        # The main thread raises CUDA errors, too.
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
        # The monitor would abort the process while the watchdog waits for CUDA.
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(int(timeout)),
    }
    file = str(folder / "nccl-")
    if torch.__version__ < (2, 9):
        wanted |= {
            "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": file,
        }
    elif "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in environ:
        wanted["TORCH_FR_DUMP_TEMP_FILE"] = file  # the recorder is on by default
    for name, value in wanted.items():
        if name.removeprefix("TORCH_") not in environ:  # the older name of some variables
            environ.setdefault(name, value)
