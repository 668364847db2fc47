"""Starts the processes of a run by Detectron2's launcher, or joins those that something started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

from contnet.launch.environment import DistributedEnvironment, Processes
from contnet.launch.rendezvous import rendezvous
from contnet.utils.cpus import available_cpus
from contnet.utils.errors import UserError, print_error

__all__ = ["launch_run"]


def _share_cpus(cpus: int, processes: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cpus // processes))


def _machine_cpus(env: DistributedEnvironment) -> int:
    """CPUs of all processes of this machine: SLURM may have bound each to its own."""
    bound = comm.all_gather(os.sched_getaffinity(0))
    first = env.rank - env.local_rank
    return len(set().union(*bound[first : first + env.local_size]))


def _worker(function: Callable, argument: object, num_gpus: int, on_cpu: bool) -> None:
    """A spawned process; its caller only sees its exit status."""
    # Spawned processes would spawn their loader workers too, each importing everything again.
    torch.multiprocessing.set_start_method("fork", force=True)
    if on_cpu:
        _share_cpus(available_cpus(), num_gpus)
    try:
        function(argument)
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
    function: Callable, argument: object, processes: Processes, on_cpu: bool, timeout: float
) -> object:
    env = processes.environment
    if processes.num_gpus not in (1, env.local_size):
        raise UserError(
            f"--num-gpus is {processes.num_gpus}, but {env.launcher} started {env.local_size} "
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
            _share_cpus(_machine_cpus(env), env.local_size)
        return function(argument)
    finally:
        dist.destroy_process_group()


def launch_run(
    function: Callable,
    argument: object,
    processes: Processes,
    device: str,
    timeout: float = 1800.0,
) -> object:
    """Runs ``function(argument)`` in every process of a run.

    Args:
        function: importable, called once the processes can talk to each other.
        argument: the same in all processes; pickled for those that are started here.
        processes: of the run.
        device: MODEL.DEVICE. Processes on the CPU talk through gloo, also where there are GPUs.
        timeout: seconds after which processes that torchrun or SLURM started stop to wait for
            each other.

    Returns:
        What ``function`` returns, if it was called in this process; otherwise None.

    Raises:
        UserError: from ``function``, where this is the only process of the machine.
        SystemExit: with status 1, if a process failed and has said why.
    """
    on_cpu = device == "cpu"
    if on_cpu:
        # Detectron2's launcher takes NCCL wherever it sees a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if processes.environment.launcher:
        return _join_run(function, argument, processes, on_cpu, timeout)
    if processes.world_size == 1:
        return function(argument)
    try:
        launch(
            _worker,
            processes.num_gpus,
            num_machines=processes.num_machines,
            machine_rank=processes.machine_rank,
            dist_url=processes.dist_url,
            args=(function, argument, processes.num_gpus, on_cpu),
        )
    except ProcessExitedException as error:
        sys.exit(error.exit_code if error.exit_code > 0 else 1)
    return None
