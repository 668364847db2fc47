"""What NCCL does when a rank is gone, or hangs: nothing, until the job's watcher has spoken."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

import torch

__all__ = ["leave_failures_to_watcher"]


def leave_failures_to_watcher(
    folder: Path, timeout: float, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Sets PyTorch's variables for NCCL, before a process group is made; those that are set stay.

    By itself PyTorch's watchdog aborts the process at the first error of NCCL or CUDA, before it
    can say why or requeue the job. It must not abort communicators instead: the kernels would end,
    and the training go on with gradients that nobody has summed.

    Args:
        folder: of the attempt, for the flight recorder's files ``nccl-<rank>``.
        timeout: of the process group in seconds, longer than the watcher's.
        environ: to be changed.
    """
    wanted = {
        # No handling: a broken collective stands still, or raises in the main thread.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        # The main thread raises CUDA's errors too.
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
        # The monitor, which would abort the process for a watchdog that waits for CUDA.
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
        if name.removeprefix("TORCH_") not in environ:  # the older name of some
            environ.setdefault(name, value)
