"""A tiny detector for real training jobs that start fast, with faults.

Jobs import this module by name when they unpickle a :class:`ToyJob`.
"""

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn import functional as F

from contnet.slurm.job import TrainingJob

__all__ = ["ToyJob"]

# Set by a job in its own process; see ToyJob.
FAULTS = {}


def _at(fault: str) -> bool:
    """Returns whether a fault should happen now, in the job's first start."""
    if fault not in FAULTS or os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        return False
    rank, iteration = FAULTS[fault]
    return comm.get_rank() == rank and get_event_storage().iter == iteration


@BACKBONE_REGISTRY.register()
class ToyBackbone(Backbone):
    """Two convolutions with dropout between, so that the random state matters."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.Conv2d(4, 2, 3)
        )

    def forward(self, images):
        return self.layers(images)


@META_ARCH_REGISTRY.register()
class Toy(nn.Module):
    """Learns the mean of its features; detects one box per image, whose size depends on them."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg)

    def forward(self, batch):
        images = [F.interpolate(x["image"][None].float() / 255, (32, 32)) for x in batch]
        features = self.backbone(torch.cat(images)).flatten(1)
        if self.training:
            self._misbehave()
            loss = features.square().mean()
            return {"loss": loss * float("nan") if _at("nan") else loss}
        time.sleep(FAULTS.get("evaluation", 0))
        return [self._detections(x, f.mean()) for x, f in zip(batch, features, strict=True)]

    def _misbehave(self):
        time.sleep(FAULTS.get("pace", 0))
        if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            time.sleep(FAULTS.get("slow", 0))
        if _at("crash"):
            raise ValueError("a fault of this rank's own")
        if _at("memory"):
            raise torch.OutOfMemoryError("a GPU that is too small")
        if _at("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if _at("sleep"):
            time.sleep(1000)

    def _detections(self, image, mean):
        found = Instances((image["height"], image["width"]))
        side = 10 + 10 * mean.abs().item()
        found.pred_boxes = Boxes(torch.tensor([[5, 5, 5 + side, 5 + side]]))
        found.scores = torch.tensor([0.9])
        found.pred_classes = torch.tensor([0])
        return {"instances": found}


@dataclass
class ToyJob(TrainingJob):
    """A training of the toy with faults.

    Attributes:
        faults: "crash", "memory", "nan", "kill", "sleep": (rank, iteration) of the fault in the
            first attempt; "pace": seconds per iteration, "slow": the same only in the first
            attempt, "evaluation": seconds per evaluated batch; "save": seconds to write a
            checkpoint.
    """

    faults: dict = field(default_factory=dict)

    def __call__(self) -> dict:
        FAULTS.update(self.faults)
        if "save" in FAULTS:
            self._slow_saves(FAULTS["save"])
        return super().__call__()

    def _slow_saves(self, seconds: float) -> None:
        """Leaves a file partly written for some time, and creates a file that shows this."""
        save = torch.save

        def slow(data, file):
            save(data, file)
            file.flush()
            Path(self.run_folder, "saving").touch()
            time.sleep(seconds)

        torch.save = slow
