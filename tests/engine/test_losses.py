"""Tests the losses of a step: how often they are read, what is recorded, what stops training."""

import collections
import re
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SMALL, metrics_of
from detectron2.engine import HookBase, SimpleTrainer, launch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from contnet.config import load_config
from contnet.engine.trainer import Trainer
from contnet.utils.errors import UserError

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
OPTIONS = """
MODEL.META_ARCHITECTURE BrightnessToy DATASETS.TEST () SOLVER.GRAD_ACCUM_STEPS 2 SOLVER.MAX_ITER 3
SOLVER.IMS_PER_BATCH 4 SOLVER.BASE_LR 0.01 SOLVER.WARMUP_ITERS 0 LOG_PERIOD 1
SOLVER.CHECKPOINT_PERIOD 1 DATALOADER.ASPECT_RATIO_GROUPING False
"""


@META_ARCH_REGISTRY.register()
class BrightnessToy(nn.Module):
    """Two losses of the mean brightness; all passes are recorded.

    Attributes:
        nan_at: number of the pass whose loss is nan.
    """

    def __init__(self, cfg):
        super().__init__()
        self.backbone = nn.Linear(1, 1)
        self.seen, self.nan_at = [], -1

    def forward(self, batch):
        mean = torch.stack([x["image"].float().mean()[None] / 255 for x in batch])
        output = self.backbone(mean)
        broken = float("nan") if len(self.seen) == self.nan_at else 1.0
        losses = {"loss_mean": output.mean() * broken, "loss_square": output.square().mean()}
        ids = [x["image_id"] for x in batch]
        self.seen.append((ids, {name: loss.detach() for name, loss in losses.items()}))
        return losses


def trainer_of(folder, *options):
    """Builds a trainer of the toy, with two passes per step."""
    Path(folder).mkdir(exist_ok=True)
    options = [*SMALL, *OPTIONS.split(), "OUTPUT_DIR", str(folder), *options]
    torch.manual_seed(1)
    return Trainer(load_config(LEAF, options), seed=4)


class Reads(TorchDispatchMode):
    """Counts operations that wait for a GPU: single values read, and data-dependent sizes."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def total(self):
        """Returns the number of values read, and of sizes."""
        return self.counts["_local_scalar_dense"], self.counts["nonzero"]


class CountReads(HookBase):
    """Counts the reads in each step of a trainer."""

    def __init__(self):
        self.steps = []

    def before_step(self):
        self.mode = Reads().__enter__()

    def after_step(self):
        self.mode.__exit__(None, None, None)
        self.steps.append(self.mode.total())


def test_a_step_reads_no_loss_on_its_own(coco_here):
    """All losses are copied as one tensor; each separate read would wait for the GPU."""
    trainer, counting = trainer_of(coco_here / "run"), CountReads()
    trainer.register_hooks([counting])
    trainer.train(0, 3)
    assert counting.steps[1:] == [(0, 0)] * 2  # the first one starts the loader, which draws a seed


class Observe(HookBase):
    """Compares metrics with those of Detectron2's trainer; keeps the weights of a step."""

    def __init__(self):
        self.differences = []

    def before_step(self):
        self.weights = [p.detach().clone() for p in self.trainer.unwrapped_model.parameters()]

    def after_step(self):
        trainer = self.trainer
        passes = [losses for _, losses in trainer.unwrapped_model.seen[-2:]]
        sums = {name: sum(losses[name] / 2 for losses in passes) for name in passes[0]}
        ours = trainer.storage.latest()
        with EventStorage(trainer.iter) as storage:
            SimpleTrainer.write_metrics(sums, ours["rank_data_time"][0], trainer.iter)
        theirs = storage.latest()
        assert comm.get_rank() or len(theirs) == 5
        self.differences += [name for name in theirs if ours[name] != theirs[name]]
        if len(trainer.storage.history("rank_data_time").values()) != trainer.iter + 1:
            self.differences.append("puts")


def _train(folder, nan_at):
    """Trains in this process; returns the results."""
    trainer, observe = trainer_of(folder), Observe()
    trainer.unwrapped_model.nan_at = nan_at
    trainer.register_hooks([observe])
    message = ""
    try:
        trainer.fit()
    except UserError as error:
        message = str(error)
    return {
        "message": message,
        "differences": observe.differences,
        "images": [ids for ids, _ in trainer.unwrapped_model.seen],
        "before": observe.weights,
        "after": list(trainer.unwrapped_model.parameters()),
    }


def test_metrics_are_those_of_detectron2s_trainer(coco_here):
    assert _train(coco_here / "run", nan_at=-1)["differences"] == []


def check_stopped(result):
    """Checks that the training ended before the optimiser's third step."""
    assert len(result["images"]) == 6 and result["differences"] == []
    assert all(map(torch.equal, result["before"], result["after"]))


def message_of(images):
    """Returns a pattern for the iteration and the images of a pass."""
    losses = r"loss_mean nan, loss_square \d.*"
    return rf"the loss is not finite at iteration 2 \({losses}\), images {images}: check"


def test_a_loss_that_is_not_finite_names_the_images_of_its_pass(coco_here):
    result = _train(coco_here / "run", nan_at=4)
    check_stopped(result)
    ids = ", ".join(map(str, result["images"][4]))
    assert re.match(message_of(ids), result["message"])


def _train_a_rank(folder):
    torch.set_num_threads(1)
    rank = comm.get_rank()
    good = _train(f"{folder}/good", nan_at=-1)
    bad = _train(f"{folder}/bad", nan_at=5 if rank == 1 else -1)
    torch.save((good, bad), f"{folder}/rank{rank}.pt")


@pytest.mark.slow
def test_two_processes_have_the_same_metrics_and_stop_together(coco_here, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch(_train_a_rank, 2, dist_url="auto", args=(str(coco_here),))
    (good0, bad0), (good1, bad1) = (torch.load(coco_here / f"rank{i}.pt") for i in range(2))
    assert good0["differences"] == good1["differences"] == []
    assert good0["message"] == good1["message"] == ""
    assert not any(map(torch.equal, good0["before"], good0["after"]))
    for bad in (bad0, bad1):
        check_stopped(bad)
    assert all(map(torch.equal, bad0["after"], bad1["after"]))
    ids = ", ".join(map(str, bad1["images"][5]))
    assert bad1["images"][5] != bad0["images"][5]
    assert re.match(message_of(ids), bad1["message"])
    assert bad0["message"] == f"rank 1: {bad1['message']}"
    assert [line["iteration"] for line in metrics_of(coco_here / "bad")] == [0, 1]
    newest = torch.load(coco_here / "bad" / "model_0000001.pth")
    assert all(map(torch.equal, newest["model"].values(), bad0["after"]))
    assert len(list((coco_here / "bad").glob("*.pth"))) == 2
