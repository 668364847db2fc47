"""Chooses the GPU of each process, and checks that it exists and is not used by another process."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence

import torch
from detectron2.utils import comm

from contnet.launch.environment import DistributedEnvironment
from contnet.utils.errors import UsageError, UserError
from contnet.utils.text import plural

__all__ = [
    "check_device_value",
    "check_gpu_count",
    "choose_gpu",
    "gpu_uuid",
    "refuse_shared_gpus",
]

_GIVE = (
    "give each process its own, for example with SLURM's --gpus-per-task 1, or start one per GPU"
)


def check_device_value(device: str, processes: int = 1) -> None:
    """Checks the value of MODEL.DEVICE.

    Args:
        device: value of the key.
        processes: number of processes on all machines.

    Raises:
        UsageError: if it is not a device, or if it is a single GPU for several processes.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"MODEL.DEVICE is {device!r}, it must be cuda or cpu")
    if ":" in device and processes > 1:
        raise UsageError(
            f"MODEL.DEVICE is {device!r}, which is one GPU for {processes} processes: set it to "
            "cuda, so that each uses its own"
        )


def check_gpu_count(device: str, wanted: int, present: int, launcher: str = "") -> None:
    """Checks that this machine has enough GPUs for the run.

    Args:
        device: a legal MODEL.DEVICE.
        wanted: number of processes on this machine (--num-gpus).
        present: number of GPUs that PyTorch sees in this process.
        launcher: launcher of the processes, "" for none. It may make only one GPU visible to each.

    Raises:
        UserError: if there are not enough.
    """
    if device == "cpu":
        return
    if present == 0:
        raise UserError("PyTorch finds no GPU on this machine: add MODEL.DEVICE cpu")
    if wanted > present and not (launcher and present == 1):
        raise UserError(f"--num-gpus is {wanted}, but this machine has {present}")
    index = int(device.partition(":")[2] or 0)
    if index >= present:
        raise UserError(
            f"MODEL.DEVICE is {device!r}, but this machine has {plural(present, 'GPU')}, from "
            "cuda:0: use cuda for the first"
        )


def choose_gpu(env: DistributedEnvironment, present: int) -> int:
    """Returns the GPU index for a process that was started by a launcher.

    Args:
        env: environment of the process.
        present: number of GPUs that PyTorch sees in it.

    Raises:
        UserError: if there are too few.
    """
    if present == 1:  # also if the launcher makes only its own GPU visible to each process
        return 0
    if env.local_size > present:
        raise UserError(
            f"{env.launcher} started {env.local_size} processes here, but this machine has "
            f"{plural(present, 'GPU')}: {_GIVE}"
        )
    return env.local_rank


def gpu_uuid() -> str:
    """Returns the UUID of the current GPU; "" if PyTorch does not know it."""
    return str(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", ""))


def _check_shared(gpus: Sequence[tuple[str, str]]) -> None:
    """Raises UserError if two ranks use the same GPU; takes each rank's host and GPU UUID."""
    for host, uuid in gpus:
        ranks = [rank for rank, (_, other) in enumerate(gpus) if uuid and other == uuid]
        if len(ranks) > 1:
            *others, last = map(str, ranks)
            raise UserError(
                f"ranks {', '.join(others)} and {last} on {host} use the same GPU ({uuid}): {_GIVE}"
            )


def refuse_shared_gpus(uuid: str) -> None:
    """Checks that no two ranks use the same GPU; all ranks call this before they use NCCL.

    Args:
        uuid: UUID of this rank's GPU.

    Raises:
        UserError: on all ranks, if two of them use the same GPU.
    """
    _check_shared(comm.all_gather((socket.gethostname(), uuid)))
