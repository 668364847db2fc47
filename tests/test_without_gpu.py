"""Tests every system on a simulated GPU: devices and types are never mixed."""

import json
import math

import pytest
import torch
from conftest import SMALL
from leaves import CONFIGS, SYSTEMS, TINY
from marked_devices import pretended_gpu

from contnet.config import load_config
from contnet.data.datasets.register import register_datasets
from contnet.engine.trainer import Trainer

OPTIONS = """
MODEL.DEVICE cuda SOLVER.AMP.ENABLED True SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.5
SOLVER.CHECKPOINT_BACKGROUND True SOLVER.CHECKPOINT_PERIOD 2 SOLVER.MAX_ITER 3 LOG_PERIOD 1
SOLVER.BASE_LR 0.000001 TEST.LOSS_PERIOD 2
MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 MODEL.RETINANET.SCORE_THRESH_TEST 0.0
MODEL.FCOS.SCORE_THRESH_TEST 0.0 TEST.DETECTIONS_PER_IMAGE 10
TEST.AUG.ENABLED True TEST.AUG.MIN_SIZES (64,) TEST.AUG.MAX_SIZE 96
"""


@pytest.fixture(autouse=True)
def data_here(coco_here, cityscapes_root, imagenet_here):
    """Provides tiny versions of all data sets."""


def trainer_of(name, folder, *options):
    """Builds a trainer on the GPU, with an initial loss scale for finite gradients."""
    words = [*SMALL, *TINY, *OPTIONS.split(), *SYSTEMS[name][0].split(), *options]
    folder.mkdir()
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), [*words, "OUTPUT_DIR", str(folder)])
    register_datasets(cfg)
    trainer = Trainer(cfg, seed=1)
    if state := trainer.scaler.state_dict():
        trainer.scaler.load_state_dict({**state, "scale": 2.0**-10})
    return trainer


def tensors(content):
    """Returns all tensors in nested dicts and lists."""
    if isinstance(content, torch.Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content
    nested = isinstance(content, (dict, list, tuple))
    return [tensor for part in parts for tensor in tensors(part)] if nested else []


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_run_stays_on_the_gpu(name, dtype, tmp_path):
    """Training, evaluation of the EMA, background checkpoints, and a resume."""
    with pretended_gpu():
        whole = trainer_of(name, tmp_path / "whole", "SOLVER.AMP.DTYPE", dtype)
        whole.resume_or_load()
        tasks = SYSTEMS[name][1].split()
        augmented = [f"{task}_TTA" for task in tasks if whole.cfg.TEST.AUG.ENABLED]
        assert whole.fit().keys() == {*tasks, *augmented}
        options = ["SOLVER.AMP.DTYPE", dtype, "DATASETS.TEST", "()"]
        resumed = trainer_of(name, tmp_path / "resumed", *options)
        resumed.resume_or_load(str(tmp_path / "whole" / "model_0000001.pth"))
        resumed.fit()
        for each in whole.unwrapped_model, whole.ema, resumed.unwrapped_model, resumed.ema:
            assert all(tensor.is_cuda for tensor in each.state_dict().values())
        assert whole.scaler.is_enabled() == (dtype == "float16")
        assert whole.scaler.get_scale() == (
            2.0**-10 if dtype == "float16" else 1
        )  # no step was skipped
    lines = (tmp_path / "whole" / "metrics.json").read_text().splitlines()
    losses = [json.loads(line)["total_loss"] for line in lines]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    assert "gpu_memory_mb" in lines[-1]
    files = [tmp_path / folder / "model_final.pth" for folder in ("whole", "resumed")]
    ours, theirs = (tensors(torch.load(file)) for file in files)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
