"""Forward and backward of ConTNet against a plain port of it and against other backbones."""

from __future__ import annotations

import argparse

import torch

import contnet
from contnet.benchmark.timing import alternate, print_ratios

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="timed calls of each")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"), help="in pixels"
    )


def run(args: argparse.Namespace) -> None:
    model = contnet.create_model("contnet_m").eval()
    image = torch.randn(1, 3, *args.size)
    with torch.inference_mode():
        print_ratios(alternate({"ours": lambda: model(image)}, args.rounds), "ours")
