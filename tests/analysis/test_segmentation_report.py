"""Tests reports on segmenters: IoU as in the evaluation, confusion counted independently."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from PIL import Image

from contnet.analysis.galleries import GallerySettings
from contnet.analysis.segmentation import SegmentationData, segmentation_sections
from contnet.evaluation.cityscapes import CONFUSION_FILE, CityscapesSemSegEvaluator
from contnet.report.page import Facts, Gallery, Matrix, Notes, Table

CLASSES = "cityscapes_fine_sem_seg_val"
CAR, ROAD = 13, 0


def images_of(root):
    return sorted(map(str, root.rglob("leftImg8bit/val/**/*.png")))


def truth_of(image):
    path = image.replace("leftImg8bit", "gtFine", 1).replace("_leftImg8bit.png", "")
    return np.array(Image.open(f"{path}_gtFine_labelTrainIds.png"))


def predict(image, worse):
    """Returns the truth with cars as road and void as class 16; ``worse`` makes all pixels road."""
    classes = truth_of(image).astype(np.int64)
    classes[classes == 255] = 16
    classes[classes == CAR] = ROAD
    return np.zeros_like(classes) if worse else classes


def evaluate(folder, images, worse):
    evaluator = CityscapesSemSegEvaluator(CLASSES, str(folder))
    evaluator.reset()
    for number, image in enumerate(images):
        classes = torch.from_numpy(predict(image, worse and number == 0))
        scores = torch.nn.functional.one_hot(classes, 19).permute(2, 0, 1).float()
        evaluator.process([{"file_name": image}], [{"sem_seg": scores}])
    return evaluator.evaluate()["sem_seg"]


@pytest.fixture
def evaluated(cityscapes_root, tmp_path):
    """Returns metrics and sections of two runs; the first run is worse on the first image."""
    images = images_of(cityscapes_root)
    metrics = {n: evaluate(tmp_path / n, images, n == "worse") for n in ("worse", "better")}
    files = {name: tmp_path / name / CONFUSION_FILE for name in metrics}
    metadata = MetadataCatalog.get(CLASSES)
    data = SegmentationData(Path(metadata.image_dir), Path(metadata.gt_dir))
    predictors = {"worse": lambda image: np.zeros(image.shape[:2], dtype=np.int64)}
    sections = segmentation_sections("streets", files, data, predictors, 50, 0, GallerySettings(1))
    return images, metrics, sections


def of_kind(sections, kind):
    return [each for each in sections if isinstance(each, kind)]


def test_iou_is_that_of_the_evaluation(evaluated):
    _, metrics, sections = evaluated
    (facts,) = of_kind(sections, Facts)
    for name, each in metrics.items():
        assert facts.facts[f"mean IoU of {name}"] == pytest.approx(each["IoU"])
    table = next(each for each in of_kind(sections, Table) if "by class" in each.heading)
    assert len(table.rows) == 19
    for label, cells in table.rows:
        values = [f"{each[f'IoU-{label}']:.2f}" for each in metrics.values()]
        assert cells == [value.replace("nan", "n/a") for value in values]


def test_confusion(evaluated):
    images, _, sections = evaluated
    _, better = of_kind(sections, Matrix)
    truth = np.concatenate([truth_of(image).ravel() for image in images])
    found = np.concatenate([predict(image, False).ravel() for image in images])
    for k in range(19):
        pixels = found[truth == k]
        shares = [round(100 * np.mean(pixels == j)) if len(pixels) else 0 for j in range(19)]
        assert better.counts[k].tolist() == shares
    assert better.counts[CAR, ROAD] == 100


def test_difference(evaluated):
    _, metrics, sections = evaluated
    table = next(each for each in of_kind(sections, Table) if "Difference" in each.heading)
    ((metric, (cell,)),) = table.rows
    gain = metrics["better"]["IoU"] - metrics["worse"]["IoU"]
    assert metric == "mean IoU" and cell.startswith(f"+{gain:.1f}, 95 % ") and gain > 1


def test_the_worst_image_is_shown_with_truth_and_prediction(evaluated):
    images, _, sections = evaluated
    (gallery,) = of_kind(sections, Gallery)
    worst, best = gallery.images
    assert worst.name == Path(images[0]).name != best.name
    assert "sky" in worst.classes
    image = np.array(Image.open(images[0]).convert("RGB")).astype(float)
    road = 0.4 * image + 0.6 * np.array([128, 64, 128])  # Cityscapes' colour
    assert np.abs(worst.views["Prediction"] - road).max() <= 1
    truth = truth_of(images[0])
    assert np.abs(worst.views["Truth"] - road)[truth == ROAD].max() <= 1
    assert (worst.views["Truth"] == image)[truth == 255].all()


def test_what_is_damaged_is_named(tmp_path):
    file = tmp_path / CONFUSION_FILE
    file.write_bytes(b"PK\x03\x04 no")
    data = SegmentationData(tmp_path, tmp_path)
    (notes,) = segmentation_sections("s", {"run": file}, data, {}, 5, 0, GallerySettings(1))
    assert isinstance(notes, Notes) and str(file) in notes.notes[0]
