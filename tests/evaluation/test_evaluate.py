"""Tests that test sets and their ground truth are read once for all evaluations of a training."""

import builtins
import io
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, REPOSITORY, SMALL, metrics_of
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import Boxes, Instances
from imagenet import make_imagenet
from torch import nn

from contnet.config import load_config
from contnet.data.datasets.register import register_datasets
from contnet.data.datasets.shapes import make_shapes, shapes_datasets
from contnet.engine.trainer import Trainer
from contnet.evaluation.build import EVALUATORS
from contnet.evaluation.evaluate import Evaluator

pytest_plugins = ["predicted_scenes"]


class Guesses(nn.Module):
    """Guesses objects and classes of pixels and images, by file name and seed."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = seed

    def _guess(self, image: dict) -> dict:
        height, width = image["height"], image["width"]
        name = "/".join(Path(image["file_name"]).parts[-2:])
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        instances = Instances((height, width))
        corners = rng.uniform(0, 0.6, (40, 2)) * (width, height)
        sides = rng.uniform(0.1, 0.4, (40, 2)) * (width, height)
        boxes = torch.tensor(np.concatenate([corners, corners + sides], axis=1)).float()
        masks = torch.zeros(40, height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances.pred_boxes, instances.pred_masks = Boxes(boxes), masks
        instances.pred_classes = torch.tensor(rng.integers(0, 4, 40))
        instances.scores = torch.tensor(rng.random(40)).float()
        blocks = rng.random((19, 8, 16)).repeat(height // 8, axis=1).repeat(width // 16, axis=2)
        logits = torch.tensor(rng.random(7))
        return {"instances": instances, "sem_seg": torch.tensor(blocks), "logits": logits}

    def forward(self, images: list[dict]) -> list[dict]:
        return [self._guess({"height": 64, "width": 128, **image}) for image in images]


def _shapes(folder: Path) -> list[str]:
    shapes = make_shapes(folder / "shapes", num_train=2, num_val=3, max_side=200)
    sets = ["DATASETS.REGISTER", str(shapes_datasets(shapes)), "DATASETS.TEST", "('shapes_val',)"]
    return ["mask_rcnn_contti", *sets]


def _images(folder: Path) -> list[str]:
    home = make_imagenet(folder, classes=7, train=1, val=3) / "imagenet"
    sets = ["DATASETS.REGISTER", str([["mine", str(home / "val")]]), "DATASETS.TEST", "('mine',)"]
    return ["imagenet/contti", *sets, "MODEL.CLASSIFIER.NUM_CLASSES", "7"]


SETS = {
    "boxes and masks": _shapes,
    "scenes of objects": lambda folder: ["cityscapes/mask_rcnn_contti"],
    "scenes of classes": lambda folder: ["cityscapes/pspnet_contti"],
    "labels of images": _images,
}


def _forget(folder: Path) -> None:
    """Deletes the ground truth."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    for pattern in ("instances_*.json", "*_polygons.json", "annotations-*.json"):
        for file in folder.rglob(pattern):
            file.unlink()
    for label in folder.glob("imagenet/val/*"):
        shutil.copy(next(label.iterdir()), label / "new.JPEG")


@pytest.mark.parametrize("kind", SETS)
def test_later_evaluations_read_nothing_again(own_root, tmp_path, kind):
    config, *options = SETS[kind](own_root)
    own = ["DATASETS.CACHE_DIR", str(own_root / "cache"), "OUTPUT_DIR", str(own_root / "run")]
    leaf = str(REPOSITORY / "configs" / f"{config}.yaml")
    cfg = load_config(leaf, [*QUICK, *own, *options])
    register_datasets(cfg)
    (own_root / "run").mkdir()
    # Each by a separate evaluator, which reads everything.
    expected = [repr(Evaluator(cfg).evaluate(Guesses(seed))) for seed in range(3)]
    evaluator = Evaluator(cfg)
    found = [repr(evaluator.evaluate(Guesses(0)))]
    _forget(own_root)
    found += [repr(evaluator.evaluate(Guesses(seed))) for seed in (1, 2, 0)]
    assert found == [*expected, expected[0]]
    assert len(set(expected)) == 3


# --- in training ---------------------------------------------------------------------------------


@META_ARCH_REGISTRY.register()
class GuessingToy(Guesses):
    """Learns something else, and makes new guesses in each evaluation."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg)

    def forward(self, images: list[dict]) -> dict | list[dict]:
        if not self.training:
            return super().forward(images)
        self.seed += 1
        image = images[0]["image"][None, :, :32, :32] / 255
        return {"loss": self.backbone(image)["p5"].mean()}


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Records the names of the files that this process opens."""
    names, plain = [], builtins.open

    def noted(file, *args, **kwargs):
        names.append(str(file))
        return plain(file, *args, **kwargs)

    for module in (builtins, io):
        monkeypatch.setattr(module, "open", noted)
    return names


@pytest.fixture
def training(tmp_path):
    """Builds a trainer on drawn shapes, which evaluates after each of three iterations."""
    config, *options = _shapes(tmp_path)

    def make(*more: str) -> Trainer:
        own = {
            "DATASETS.TRAIN": "('shapes_train',)",
            "DATASETS.CACHE_DIR": str(tmp_path / "cache"),
            "MODEL.META_ARCHITECTURE": "GuessingToy",
            "SOLVER.MAX_ITER": "3",
            "TEST.EVAL_PERIOD": "1",
            "OUTPUT_DIR": str(tmp_path / "run"),
        }
        values = [word for pair in own.items() for word in pair]
        leaf = str(REPOSITORY / "configs" / f"{config}.yaml")
        cfg = load_config(leaf, [*SMALL, *options, *values, *more])
        register_datasets(cfg)
        (tmp_path / "run").mkdir()
        return Trainer(cfg, seed=1)

    return make


def test_a_training_reads_its_test_set_once(training, tmp_path, opened):
    annotations = str(tmp_path / "shapes" / "annotations" / "instances_val.json")
    trainer = training()
    trainer.evaluate()
    first = [name for name in opened if name == annotations]
    opened.clear()
    trainer.fit()
    assert first and annotations not in opened
    assert not [name for name in opened if "cache" in Path(name).parts]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [each["iteration"] for each in results] == [0, 1, 2]
    aps = [line["bbox/AP"] for line in metrics_of(tmp_path / "run")]
    assert len(set(aps)) == 3 and min(aps) > 0


class Count(DatasetEvaluator):
    """Counts images, like a user's evaluator."""

    def __init__(self, name: str):
        self.truth = len(DatasetCatalog.get(name))

    def reset(self) -> None:
        self.seen = 0

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        self.seen += len(inputs)

    def evaluate(self) -> dict:
        return {"count": {"share": 100 * self.seen / self.truth}}


def test_a_set_of_the_users_own_is_loaded_once(training, tmp_path, monkeypatch):
    calls = []

    def load() -> list[dict]:
        calls.append(1)
        files = sorted((tmp_path / "shapes" / "val").glob("*.jpg"))
        return [{"file_name": str(f), "image_id": i} for i, f in enumerate(files)]

    DatasetCatalog.register("own", load)
    MetadataCatalog.get("own").evaluator_type = "count"
    monkeypatch.setitem(EVALUATORS, "count", lambda cfg, name, folder: Count(name))
    training("DATASETS.TEST", "('own',)").fit()
    assert len(calls) == 2  # once by the evaluation and once by its evaluator
    shares = [line["count/share"] for line in metrics_of(tmp_path / "run")]
    assert shares == [100, 100, 100]
