"""Training steps of the models of two configs."""

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
        help="configs of detectors; the first is the baseline (default: Faster R-CNN)",
    )
    parser.add_argument("--unfrozen", action="store_true", help="freeze no layers, BN in both")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"), help="size in pixels"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="batch size")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps of each")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys for both")


def build_step(
    cfg: CfgNode, images: int, size: tuple[int, int]
) -> tuple[nn.Module, Optimizer, Callable[[], None]]:
    """Builds a detector, its optimiser, and a function that runs a training step on random images.

    Args:
        cfg: config of the detector.
        images: number of images.
        size: height and width of the images in pixels.
    """
    batch = random_inputs(cfg, images, size)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)

    def step() -> None:
        optimizer.zero_grad()
        with EventStorage(), autocast(cfg):  # for the model's metrics
            loss = sum(model(batch).values())
        loss.backward()
        optimizer.step()

    return model, optimizer, step


def run(args: argparse.Namespace) -> None:
    """Prints the ratios of the two configs' steps."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A small learning rate, so that random weights stay finite and the losses cost as usual.
    opts = ["MODEL.DEVICE", device, "SOLVER.BASE_LR", "1e-6", *args.opts]
    if args.unfrozen:
        opts += ["MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.CONTNET.FREEZE_AT", "0"]
        opts += ["MODEL.RESNETS.NORM", "BN", "MODEL.CONTNET.NORM", "BN"]
    ways = {
        file: build_step(load_checked_config(file, opts), args.batch, tuple(args.size))[2]
        for file in args.configs
    }
    print_ratios(alternate(ways, args.rounds), args.configs[0])
