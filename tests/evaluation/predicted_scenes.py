"""Made-up predictions for the drawn Cityscapes, and evaluators run on them."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapes import use_cityscapes
from cityscapesscripts.helpers.labels import id2label
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image

INSTANCES, CLASSES = "cityscapes_fine_instance_seg_train", "cityscapes_fine_sem_seg_train"
THINGS = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]


def truth_file(image: str, kind: str) -> str:
    return image.replace("leftImg8bit/", "gtFine/").replace("leftImg8bit", f"gtFine_{kind}")


def read(file: str) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def images_of(root: Path, split: str = "train") -> list[str]:
    return sorted(map(str, (root / "cityscapes" / "leftImg8bit" / split).glob("*/*.png")))


def to_instances(masks: list, classes: list[int], scores: list[float]) -> Instances:
    masks = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, 64, 128)
    instances = Instances(tuple(masks.shape[1:]))
    instances.pred_masks = masks.bool()
    instances.pred_boxes = Boxes(BitMasks(instances.pred_masks).get_bounding_boxes().tensor)
    instances.scores = torch.tensor(scores, dtype=torch.float32)
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


def predict_instances(image: str, exact: bool = False) -> Instances:
    """Predicts true objects; unless exact, also shifted, repeated, misclassified or empty ones."""
    rng = np.random.default_rng(int(Path(image).stem[-22:-19], 36))
    pixels = read(truth_file(image, "instanceIds"))
    masks, classes, scores = [], [], []

    def add(mask, index):
        masks.append(mask)
        classes.append(index)
        scores.append(rng.integers(1, 8) / 8 if rng.random() < 0.5 else rng.random())

    for value in np.unique(pixels[pixels >= 1000]):
        index = THINGS.index(id2label[int(value) // 1000].name)
        add(pixels == value, index)
        if exact:
            continue
        masks[-1] = np.roll(masks[-1], rng.integers(-2, 3, 2), axis=(0, 1))
        if rng.random() < 0.4:
            add(np.roll(masks[-1], 1, axis=1), index)
        if rng.random() < 0.3:
            add(masks[-1], rng.integers(len(THINGS)))
    if not exact:
        for mask in (pixels == 26, pixels == 3, pixels == 0, pixels < 0, pixels == 7):
            add(mask, THINGS.index("car"))
    return to_instances(masks, [int(index) for index in classes], scores)


def predict_classes(image: str, seed: int = 0) -> torch.Tensor:
    """Predicts scores (19, H, W): mostly for the true class, otherwise for any class."""
    rng = np.random.default_rng([seed, int(Path(image).stem[-22:-19], 36)])
    truth = read(truth_file(image, "labelTrainIds"))
    other = rng.integers(0, 19, (8, 16)).repeat(8, axis=0).repeat(8, axis=1)
    chosen = np.where((rng.random(truth.shape) < 0.8) & (truth < 19), truth, other)
    return torch.nn.functional.one_hot(torch.from_numpy(chosen).long(), 19).permute(2, 0, 1).float()


def run_evaluator(evaluator, images: list[str], predictions: list[dict]) -> dict:
    evaluator.reset()
    for image, prediction in zip(images, predictions, strict=True):
        record = {"file_name": image, "image_id": os.path.basename(image)}
        evaluator.process([record], [prediction])
    return evaluator.evaluate()


@pytest.fixture
def own_root(tmp_path, cityscapes_root):
    """Copies the data set, so that tests can damage it; Detectron2's names point to the copy."""
    root = tmp_path / "own"
    shutil.copytree(cityscapes_root, root)
    use_cityscapes(root)
    yield root
    use_cityscapes(cityscapes_root)
