"""Training steps of two configs' models beside each other."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn
from torch.optim import Optimizer

from benchmarks.timing import alternate, print_ratios
from contnet.data.pipeline.random_inputs import random_inputs
from contnet.engine.optimizer import build_optimizer
from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.amp import autocast
from contnet.modeling.build import build_model

__all__ = ["add_arguments", "build_step", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--configs",
        nargs=2,
        default=("configs/faster_rcnn_r50.yaml", "configs/faster_rcnn_contm.yaml"),
        metavar="FILE",
        help="of detectors with boxes; the first is the baseline (default: Faster R-CNN's)",
    )
    parser.add_argument("--unfrozen", action="store_true", help="freeze nothing, BN in both")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"), help="in pixels"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps of each")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys of both")


def build_step(
    cfg: CfgNode, images: int, size: tuple[int, int]
) -> tuple[nn.Module, Optimizer, Callable[[], None]]:
    """A detector, its optimiser, and a call that trains a step on random images.

    Args:
        cfg: of the detector.
        images: how many.
        size: height and width in pixels.
    """
    batch = random_inputs(cfg, images, size)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)

    def step() -> None:
        optimizer.zero_grad()
        with EventStorage(), autocast(cfg):  # where the model puts its metrics
            loss = sum(model(batch).values())
        loss.backward()
        optimizer.step()

    return model, optimizer, step


def run(args: argparse.Namespace) -> None:
    """Prints the ratios of the two configs' steps."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A rate at which random weights stay finite, so that the losses cost what they cost.
    opts = ["MODEL.DEVICE", device, "SOLVER.BASE_LR", "1e-6", *args.opts]
    if args.unfrozen:
        opts += ["MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.CONTNET.FREEZE_AT", "0"]
        opts += ["MODEL.RESNETS.NORM", "BN", "MODEL.CONTNET.NORM", "BN"]
    ways = {
        file: build_step(load_checked_config(file, opts), args.batch, tuple(args.size))[2]
        for file in args.configs
    }
    print_ratios(alternate(ways, args.rounds), args.configs[0])
