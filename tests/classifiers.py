"""Configs of classifiers of ten classes, and batches for them."""

import torch
from conftest import REPOSITORY
from detectron2.config import CfgNode

from contnet.launch.preflight_config import load_checked_config

CLASSES = 10
SMALL = ["MODEL.DEVICE", "cpu", "MODEL.CLASSIFIER.NUM_CLASSES", str(CLASSES)]
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)


def config(*opts, leaf="contti") -> CfgNode:
    return load_checked_config(
        str(REPOSITORY / "configs" / "imagenet" / f"{leaf}.yaml"), [*SMALL, *opts]
    )


def batch(count=4, size=64):
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    return [{"image": image, "label": (3 * i) % CLASSES} for i, image in enumerate(images)]


def normalised(inputs):
    return torch.stack([(each["image"] - MEAN) / STD for each in inputs])
