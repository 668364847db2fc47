"""Saves untrained models with their config and class names."""

from pathlib import Path

import torch
from conftest import QUICK, SMALL
from leaves import CONFIGS, SYSTEMS, TINY

import contnet
from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.metadata import describe_model

__all__ = ["NAMES", "OPTIONS", "save_untrained"]

NAMES = ["disc", "box", "star"]
OPTIONS = """
MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 MODEL.RETINANET.SCORE_THRESH_TEST 0.0
MODEL.FCOS.SCORE_THRESH_TEST 0.0 TEST.DETECTIONS_PER_IMAGE 5
MODEL.ROI_HEADS.NUM_CLASSES 3 MODEL.RETINANET.NUM_CLASSES 3 MODEL.FCOS.NUM_CLASSES 3
MODEL.SEM_SEG_HEAD.NUM_CLASSES 3 MODEL.CLASSIFIER.NUM_CLASSES 3
"""


def save_untrained(folder: Path, name: str) -> Path:
    """Saves the checkpoint of a system of ``SYSTEMS`` with three classes."""
    small = QUICK if name.startswith("imagenet") else SMALL
    words = [*small, *TINY, *SYSTEMS[name][0].split(), *OPTIONS.split()]
    cfg = contnet.load_config(str(CONFIGS / f"{name}.yaml"), words)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = contnet.build_model(cfg)
    Checkpointer(model, str(folder), metadata=describe_model(cfg, NAMES)).save("model_final")
    return folder / "model_final.pth"
