"""Tests transforms of images for classification."""

import random

import numpy as np
import pytest
import torch
from classifiers import CLASSES, config
from imagenet import draw_picture
from PIL import Image
from torchvision.transforms import v2

from contnet.data.pipeline.transforms import build_classification_transform


def test_training_images_differ_by_seed_and_policy():
    picture = draw_picture(1, CLASSES, 90, np.random.default_rng(0))
    outputs = []
    for policy in ("''", "rand-m9-mstd0.5-inc1", "original"):
        cfg = config("INPUT.CLASSIFIER.AUTO_AUGMENT", policy, "INPUT.CLASSIFIER.SIZE", "32")
        transform = build_classification_transform(cfg, is_train=True)
        for seed in (1, 2, 1):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            outputs.append(transform(picture))
            assert outputs[-1].shape == (3, 32, 32) and outputs[-1].dtype == torch.uint8
        assert torch.equal(outputs[-1], outputs[-3])
    # The outputs of all three policies and two seeds.
    assert len({each.numpy().tobytes() for each in outputs}) == 6


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (182, 160), (61, 61), (320, 288)])
def test_test_images_are_resized_and_cropped_in_the_middle(resize, crop):
    picture = draw_picture(0, CLASSES, 100, np.random.default_rng(0))
    sizes = ["INPUT.CLASSIFIER.RESIZE_TEST", str(resize), "INPUT.CLASSIFIER.CROP_TEST", str(crop)]
    found = build_classification_transform(config(*sizes), is_train=False)(picture)
    width = int(resize * picture.width / picture.height)
    resized = picture.resize((width, resize), Image.Resampling.BILINEAR)
    top, left = round((resize - crop) / 2), round((width - crop) / 2)
    cut = resized.crop((left, top, left + crop, top + crop))
    assert torch.equal(found, v2.functional.pil_to_tensor(cut))
