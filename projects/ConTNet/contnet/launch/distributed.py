"""Starts the processes of a run by Detectron2's launcher, or joins those that something started."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

from contnet.launch.environment import DistributedEnvironment, find_environment, rendezvous
from contnet.utils.errors import UserError, print_error

__all__ = ["launch_run"]


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
        # Threads of gloo that outlive the interpreter would abort the process.
        dist.destroy_process_group()
    except UserError as error:
        print_error(error)
        sys.exit(1)


def _choose_gpu(env: DistributedEnvironment) -> None:
    present = torch.cuda.device_count()
    if present == 1:  # also where each task is given its own
        torch.cuda.set_device(0)
    elif env.local_size > present:
        raise UserError(
            f"{env.launcher} started {env.local_size} processes here, but this machine has "
            f"{present} GPUs"
        )
    else:
        torch.cuda.set_device(env.local_rank)


def _join_run(
    env: DistributedEnvironment,
    function: Callable,
    args: argparse.Namespace,
    on_cpu: bool,
    timeout: float,
) -> None:
    if args.num_gpus not in (1, env.local_size):
        raise UserError(
            f"--num-gpus is {args.num_gpus}, but {env.launcher} started {env.local_size} "
            "processes per machine: it must start one for each GPU"
        )
    if not on_cpu:
        _choose_gpu(env)
    options = {"timeout": timedelta(seconds=timeout)}
    if env.launcher != "torchrun":
        store = dist.PrefixStore("run", rendezvous(env, timeout=timeout))
        options |= {"store": store, "rank": env.rank, "world_size": env.world_size}
    dist.init_process_group("gloo" if on_cpu else "nccl", **options)
    try:
        comm.create_local_process_group(env.local_size)
        if on_cpu:
            _share_cores(env.local_size)
        function(args)
    finally:
        dist.destroy_process_group()


def launch_run(
    function: Callable, args: argparse.Namespace, device: str, timeout: float = 1800.0
) -> None:
    """Runs ``function(args)`` in every process of a run.

    Args:
        function: importable, called once the processes can talk to each other.
        args: of :func:`contnet.launch.arguments.parse_arguments`.
        device: MODEL.DEVICE. Processes on the CPU talk through gloo, also where there are GPUs.
        timeout: seconds after which processes that torchrun or SLURM started stop to wait for
            each other.

    Raises:
        UserError: from ``function``, where this is the only process of the machine.
        SystemExit: with status 1, if a process failed and has said why.
    """
    on_cpu = device == "cpu"
    if on_cpu:
        # Detectron2's launcher takes NCCL wherever it sees a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if env := find_environment():
        _join_run(env, function, args, on_cpu, timeout)
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
