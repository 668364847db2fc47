"""Starts the processes of a run: by Detectron2's launcher, or as torchrun has started them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

from contnet.errors import UserError

__all__ = ["launch_run", "print_error"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def print_error(error: UserError) -> None:
    """Says what is wrong, in one line on the error stream."""
    # PyTorch puts a loader worker's traceback before the message.
    line = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2]
    print(f"error: {line.strip()}", file=sys.stderr, flush=True)


def _share_cores(processes: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def _worker(function: Callable, args: argparse.Namespace, on_cpu: bool) -> None:
    """A spawned process; its caller only sees its exit status."""
    # Spawned processes would spawn their loader workers too, each importing everything again.
    torch.multiprocessing.set_start_method("fork", force=True)
    if on_cpu:
        _share_cores(args.num_gpus)
    try:
        function(args)
    except UserError as error:
        print_error(error)
        sys.exit(1)


def _run_under_torchrun(function: Callable, args: argparse.Namespace, on_cpu: bool) -> None:
    if missing := [name for name in _TORCHRUN if name not in os.environ]:
        raise UserError(
            f"RANK is set as by torchrun, but {', '.join(missing)} is not: unset RANK, or set all "
            f"of {', '.join(_TORCHRUN)}"
        )
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if not on_cpu:
        if local_size > torch.cuda.device_count():
            raise UserError(
                f"torchrun started {local_size} processes here, but this machine has "
                f"{torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group("gloo" if on_cpu else "nccl")
    try:
        comm.create_local_process_group(local_size)
        if on_cpu:
            _share_cores(local_size)
        function(args)
    finally:
        torch.distributed.destroy_process_group()


def launch_run(function: Callable, args: argparse.Namespace, device: str) -> None:
    """Runs ``function(args)`` in every process of a run.

    Args:
        function: importable, called once the processes can talk to each other.
        args: of :func:`contnet.launch.arguments.parse_arguments`.
        device: MODEL.DEVICE. Processes on the CPU talk through gloo, also where there are GPUs.

    Raises:
        UserError: from ``function``, where this is the only process of the machine.
        SystemExit: with status 1, if a process failed and has said why.
    """
    on_cpu = device == "cpu"
    if on_cpu:
        # Detectron2's launcher takes NCCL wherever it sees a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "RANK" in os.environ:
        _run_under_torchrun(function, args, on_cpu)
        return
    if args.num_gpus * args.num_machines == 1:
        function(args)
        return
    try:
        launch(
            _worker,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(function, args, on_cpu),
        )
    except ProcessExitedException as error:
        sys.exit(error.exit_code if error.exit_code > 0 else 1)
