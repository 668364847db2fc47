"""Starts the processes of a run with Detectron2's launcher, or joins those of another launcher."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.resource_tracker import ensure_running

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from contnet.launch.environment import DistributedEnvironment, Processes
from contnet.launch.gpus import choose_gpu, gpu_uuid, refuse_shared_gpus
from contnet.launch.rendezvous import rendezvous
from contnet.utils.cpus import available_cpus
from contnet.utils.errors import UsageError, UserError, print_error
from contnet.utils.failures import describe_death
from contnet.utils.signals import Interrupted, Listener, end_children, end_now, heeded_signals

__all__ = ["launch_run"]


def _share_cpus(cpus: int, processes: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cpus // processes))


def _machine_cpus(env: DistributedEnvironment) -> int:
    """Counts the CPUs of all processes on this machine, since SLURM may bind each to its own."""
    bound = comm.all_gather(os.sched_getaffinity(0))
    first = env.rank - env.local_rank
    return len(set().union(*bound[first : first + env.local_size]))


def _worker(function: Callable, argument: object, num_gpus: int, on_cpu: bool) -> None:
    """Calls ``function`` in a spawned process; the parent only sees its exit status."""
    # By default, spawned processes also spawn their loader workers, which import everything again.
    torch.multiprocessing.set_start_method("fork", force=True)
    if on_cpu:
        _share_cpus(available_cpus(), num_gpus)
    try:
        function(argument)
        # Otherwise, gloo's threads may outlive the interpreter and abort the process.
        dist.destroy_process_group()
    except UserError as error:
        print_error(error)
        sys.exit(error.status)
    except Interrupted as error:
        end_now(error.status)  # a normal exit of the interpreter takes seconds
    finally:
        end_children()


class _Relay(Listener):
    """Context that forwards the first signal to the spawned ranks; a second one ends all at once.

    Ranks start with blocked signals, which they unblock once they can handle them.

    Args:
        number: number of ranks.
    """

    def __init__(self, number: int):
        super().__init__("contnet-relay", heeded_signals())
        self._missing = number
        self._told: set[int] = set()
        self._first: tuple[int, float] | None = None  # signal number, time in seconds

    def __enter__(self) -> _Relay:
        ensure_running()  # before blocking signals, because it unblocks them
        self.start()
        signal.pthread_sigmask(signal.SIG_BLOCK, self.numbers)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.numbers)

    def run(self) -> None:
        while not self.left:
            for number in self.listen(0.2):
                self._hear(number)
            if self._first is not None and len(self._told) < self._missing:
                self._tell(self._first[0])

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = number, now
            with contextlib.suppress(OSError, ValueError):  # the terminal may be closed
                print(
                    f"{signal.Signals(number).name}: the ranks save a checkpoint, if they train, "
                    "and exit; a second signal ends them at once",
                    file=sys.stderr,
                    flush=True,
                )
        elif now - self._first[1] > 1:
            end_now(128 + number)

    def _tell(self, number: int) -> None:
        for child in multiprocessing.active_children():
            if child.pid not in self._told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, number)
                self._told.add(child.pid)


def _join_run(
    function: Callable, argument: object, processes: Processes, on_cpu: bool, timeout: float
) -> object:
    env = processes.environment
    if processes.num_gpus not in (1, env.local_size):
        raise UsageError(
            f"--num-gpus is {processes.num_gpus}, but {env.launcher} started {env.local_size} "
            "processes per machine: it must start one for each GPU"
        )
    if not on_cpu:
        torch.cuda.set_device(choose_gpu(env, torch.cuda.device_count()))
    options = {"timeout": timedelta(seconds=timeout)}
    if env.launcher != "torchrun":
        store = dist.PrefixStore("run", rendezvous(env, timeout=timeout))
        options |= {"store": store, "rank": env.rank, "world_size": env.world_size}
    dist.init_process_group("gloo" if on_cpu else "nccl", **options)
    waits = False
    try:
        comm.create_local_process_group(env.local_size)
        if on_cpu:
            _share_cpus(_machine_cpus(env), env.local_size)
        else:
            refuse_shared_gpus(gpu_uuid())
        return function(argument)
    except Exception:
        # NCCL's cleanup would wait for collectives of ranks that have ended, and delay the error.
        waits = not on_cpu
        raise
    finally:
        if not waits:
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
        function: importable function, called once the processes are connected.
        argument: the same in all processes; pickled for spawned ones.
        processes: processes of the run.
        device: MODEL.DEVICE. Processes on the CPU use gloo, even if there are GPUs.
        timeout: seconds after which processes that torchrun or SLURM started stop waiting for each
            other.

    Returns:
        The return value of ``function``, if it was called in this process; otherwise None.

    Raises:
        UserError: from ``function``, if it was called in this process; if a spawned process was
            killed; or if the processes cannot be connected or do not have enough GPUs.
        SystemExit: with the status of a spawned process that failed and logged its error.
    """
    on_cpu = device == "cpu"
    if on_cpu:
        # Detectron2's launcher uses NCCL if it finds a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if processes.environment.launcher:
        return _join_run(function, argument, processes, on_cpu, timeout)
    if processes.world_size == 1:
        return function(argument)
    try:
        # Only the main thread receives signals.
        main = threading.current_thread() is threading.main_thread()
        with _Relay(processes.num_gpus) if main else contextlib.nullcontext():
            launch(
                _worker,
                processes.num_gpus,
                num_machines=processes.num_machines,
                machine_rank=processes.machine_rank,
                dist_url=processes.dist_url,
                args=(function, argument, processes.num_gpus, on_cpu),
            )
    except ProcessRaisedException as error:
        # Errors while connecting the ranks occur in Detectron2, where they are not caught.
        reason = str(error).strip().splitlines()[-1]
        if "Duplicate GPU" in reason:  # from NCCL, if ranks of two "machines" run on one
            raise UserError(
                f"{socket.gethostname()}: {reason}: give each --machine-rank its own machine, "
                "or its own GPUs (CUDA_VISIBLE_DEVICES)"
            ) from error
        if "DistNetworkError" not in reason and "DistStoreError" not in reason:
            raise
        raise UserError(
            f"the processes cannot connect at --dist-url {processes.dist_url}: {reason}"
        ) from error
    except ProcessExitedException as error:
        if error.exit_code > 0:
            sys.exit(error.exit_code)
        rank = processes.machine_rank * processes.num_gpus + error.error_index
        raise UserError(
            f"rank {rank} on {socket.gethostname()} (process {error.error_pid}) was "
            f"{describe_death(-error.exit_code)}"
        ) from error
    return None
