"""A training step in two processes compared with one, at the same batch size per process.

Two processes without communication are measured too: their loss is due to the machine (memory,
caches, clock), and the rest is due to the exchange of gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import distributed, nn
from torch.nn import functional as F

import contnet
from benchmarks.timing import alternate, print_ratios
from contnet.engine.trainer import wrap_ddp
from contnet.launch.distributed import launch_run
from contnet.launch.environment import Processes
from contnet.utils.errors import UserError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="contnet_m", help="name for contnet.create_model")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images per process")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps of each")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(224, 224), metavar=("H", "W"), help="size in pixels"
    )


def _stepper(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def _together(step: Callable[[], None], ranks: tuple[int, ...]) -> Callable[[], None]:
    """Returns a call in which these ranks run a step, with barriers before and after it."""

    def way() -> None:
        distributed.barrier()
        if comm.get_rank() in ranks:
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        distributed.barrier()

    return way


def _measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    device = torch.device(args.device, comm.get_rank() if args.device == "cuda" else None)
    models = [contnet.create_model(args.model).to(device) for _ in range(3)]
    images = torch.randn(args.batch, 3, *args.size, device=device)
    gradients = torch.zeros(sum(p.numel() for p in models[0].parameters()), device=device)
    alone = _stepper(models[0], images)
    ways = {
        "one process": _together(alone, (0,)),
        "two, each alone": _together(alone, (0, 1)),
        "two": _together(_stepper(wrap_ddp(models[1], args.device), images), (0, 1)),
        "only the exchange": _together(lambda: distributed.all_reduce(gradients), (0, 1)),
    }
    if args.device == "cpu":  # where the trainer sets an order with a late exchange
        usual = create_ddp_model(models[2], broadcast_buffers=False, device_ids=None)
        ways["two, usual order"] = _together(_stepper(usual, images), (0, 1))
    seconds = alternate(ways, args.rounds)
    if comm.is_main_process():
        size = f"{args.size[0]}x{args.size[1]}"
        print(f"{args.model}, batch {args.batch} per process, {size}, one thread per process")
        ratios = print_ratios(seconds, "one process")
        print(f"efficiency of two processes: {100 * ratios['two']:.0f} %")


def run(args: argparse.Namespace) -> None:
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        raise UserError("this machine does not have two GPUs: use --device cpu")
    launch_run(_measure, args, Processes(num_gpus=2), args.device)
