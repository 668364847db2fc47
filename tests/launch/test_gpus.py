"""Tests that each process uses its own GPU. No GPU is needed."""

import multiprocessing
import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from launchers import STEP, TORCHRUN
from torch.multiprocessing.spawn import ProcessRaisedException

from contnet.launch.distributed import launch_run
from contnet.launch.environment import DistributedEnvironment, Processes, find_environment
from contnet.launch.gpus import (
    check_device_value,
    check_gpu_count,
    choose_gpu,
    refuse_shared_gpus,
)
from contnet.utils.errors import UsageError, UserError


@pytest.mark.parametrize(
    ("device", "wanted", "present", "launcher", "said"),
    [
        ("cpu", 8, 0, "", None),
        ("cuda", 1, 0, "", "MODEL.DEVICE cpu"),
        ("cuda", 1, 0, "slurm", "MODEL.DEVICE cpu"),
        ("cuda", 8, 8, "", None),
        ("cuda", 2, 1, "", "--num-gpus is 2, but this machine has 1"),
        ("cuda", 4, 1, "slurm", None),  # --gpus-per-task 1
        ("cuda", 4, 1, "torchrun", None),
        ("cuda", 4, 2, "slurm", "--num-gpus is 4, but this machine has 2"),
        ("cuda:1", 1, 2, "", None),
        ("cuda:1", 1, 1, "", "'cuda:1', but this machine has 1 GPU"),
    ],
)
def test_as_many_gpus_as_asked_for(device, wanted, present, launcher, said):
    if said is None:
        check_gpu_count(device, wanted, present, launcher)
    else:
        with pytest.raises(UserError, match=said):
            check_gpu_count(device, wanted, present, launcher)


@pytest.mark.parametrize(
    ("local_rank", "present", "index"), [(0, 4, 0), (3, 4, 3), (3, 8, 3), (3, 1, 0)]
)
def test_a_process_takes_its_own_gpu_or_the_only_one(local_rank, present, index):
    env = DistributedEnvironment("slurm", 7, 8, local_rank, 4)
    assert choose_gpu(env, present) == index


def test_more_processes_than_gpus():
    env = find_environment({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "3"})
    with pytest.raises(UserError, match="started 4 processes here, but this machine has 2 GPUs"):
        choose_gpu(env, 2)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_one_gpu_for_several_processes(device):
    check_device_value(device, 1)
    check_device_value("cuda", 2)
    with pytest.raises(UsageError, match=f"'{device}', .* 2 processes: set it to cuda"):
        check_device_value(device, 2)


@pytest.mark.parametrize("device", ["gpu", "cuda1", "cuda:", "cuda:-1", "CPU", ""])
def test_no_device(device):
    with pytest.raises(UsageError, match="must be cuda or cpu"):
        check_device_value(device)


def _in_own_process(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def _compare(rank, folder, runs):
    """Runs one rank of several runs, and writes the messages that it gets."""
    store = dist.FileStore(str(folder / "store"), len(runs[0]))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(runs[0]))
    told = []
    for uuids in runs:
        try:
            refuse_shared_gpus(uuids[rank])
            told.append("")
        except UserError as error:
            told.append(str(error))
    (folder / f"{rank}").write_text("\n".join(told))
    dist.destroy_process_group()


def test_ranks_that_share_a_gpu_are_named(tmp_path):
    # PyTorch may not know the UUIDs.
    runs = [["GPU-a", "GPU-b", "GPU-c"], ["", "", "GPU-c"], ["GPU-a", "GPU-b", "GPU-a"]]
    ranks = [_in_own_process(_compare, rank, tmp_path, runs) for rank in range(3)]
    for rank, process in enumerate(ranks):
        process.join()
        *distinct, shared = (tmp_path / str(rank)).read_text().split("\n")
        assert distinct == ["", ""]
        assert shared.startswith(f"ranks 0 and 2 on {socket.gethostname()} use the same GPU ")
        assert "(GPU-a): give each process its own" in shared


def test_machine_ranks_on_one_machine_are_told_what_nccl_says(monkeypatch):
    """Detectron2's launcher uses NCCL before it calls our code."""

    def launch(*_, **__):
        said = "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 50000"
        raise ProcessRaisedException(f"NCCL error in: x.cpp:1\nLast error:\n{said}\n", 0, 7)

    monkeypatch.setattr("contnet.launch.distributed.launch", launch)
    processes = Processes(1, num_machines=2, environment=DistributedEnvironment())
    with pytest.raises(UserError, match="rank 1 and rank 0 both on CUDA device 50000: give each"):
        launch_run(len, "abc", processes, "cuda")


def _fail(_):
    raise ValueError("a fault of this rank's own")


def _fail_with_a_gpu():
    """Fails like a process with a GPU; gloo replaces NCCL, whose shutdown would hang."""
    start = dist.init_process_group
    dist.init_process_group = lambda backend, **given: start({"nccl": "gloo"}[backend], **given)
    dist.destroy_process_group = lambda: os._exit(9)
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda index: None
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid="GPU-a")
    try:
        launch_run(_fail, None, Processes(), "cuda")
    except ValueError:
        os._exit(7)


def test_an_error_is_not_held_up_by_nccl(monkeypatch):
    alone = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**alone, "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    process = _in_own_process(_fail_with_a_gpu)
    process.join()
    assert process.exitcode == 7
