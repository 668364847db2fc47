"""Tests reports on classifiers against values counted by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from contnet.analysis.bootstrap import paired_interval
from contnet.analysis.classification import classification_sections
from contnet.analysis.galleries import GallerySettings
from contnet.evaluation.classification import CLASSIFICATION_FILE, ClassificationEvaluator
from contnet.report.page import Facts, Gallery, Matrix, Notes, Table

NAMES = ["cat", "dog", "owl"]
# The true class and the logits of each image.
IMAGES = [
    (0, [5, 1, 0]),
    (0, [1, 5, 0]),
    (0, [0, 1, 0.5]),
    (1, [0, 9, 0]),
    (2, [3, 0, 2]),
    (2, [2, 0, 3]),
]


def evaluate(folder, root, logits=None):
    """Evaluates the images in two batches; returns the metrics."""
    evaluator = ClassificationEvaluator(3, str(folder), NAMES)
    rows = [
        ({"file_name": str(root / f"{i}.png"), "image_id": f"{i}.png", "label": label}, scores)
        for i, (label, scores) in enumerate(IMAGES)
    ]
    if logits is not None:
        rows = [(image, scores) for (image, _), scores in zip(rows, logits, strict=True)]
    for part in (rows[:4], rows[4:]):
        outputs = [{"logits": torch.tensor(scores, dtype=torch.float32)} for _, scores in part]
        evaluator.process([image for image, _ in part], outputs)
    return evaluator.evaluate()["classification"]


@pytest.fixture
def sections(tmp_path):
    """Returns the sections for a run and for one that is always right."""
    for i in range(len(IMAGES)):
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    right = [[9.0 * (k == label) for k in range(3)] for label, _ in IMAGES]
    assert evaluate(tmp_path / "run", tmp_path) == {"top1": 50.0}
    assert evaluate(tmp_path / "right", tmp_path, right) == {"top1": 100.0}
    files = {name: tmp_path / name / CLASSIFICATION_FILE for name in ("run", "right")}
    return classification_sections("pets", files, 100, 0, GallerySettings(2))


def of_kind(sections, kind):
    return [each for each in sections if isinstance(each, kind)]


def test_the_file_has_the_best_classes_of_each_image(tmp_path):
    evaluate(tmp_path, tmp_path)
    content = json.loads((tmp_path / CLASSIFICATION_FILE).read_text())
    assert content["class_names"] == NAMES
    image = content["images"][1]
    assert (image["label"], image["classes"]) == (0, [1, 0, 2])
    expected = torch.tensor([5.0, 1, 0]).softmax(0).tolist()
    assert image["scores"] == pytest.approx(expected, abs=1e-5)


def test_images_that_were_skipped_have_no_class(tmp_path):
    evaluator = ClassificationEvaluator(3, str(tmp_path), NAMES)
    evaluator.skip([{"file_name": "broken.png", "label": 2, "why": "it is damaged"}])
    evaluator.evaluate()
    (image,) = json.loads((tmp_path / CLASSIFICATION_FILE).read_text())["images"]
    assert image == {"file_name": "broken.png", "label": 2, "classes": [], "scores": []}
    files = {"run": tmp_path / CLASSIFICATION_FILE}
    sections = classification_sections("pets", files, 5, 0, GallerySettings(2))
    (matrix,) = of_kind(sections, Matrix)
    assert matrix.columns == [*NAMES, "nothing"] and matrix.counts[2].tolist() == [0, 0, 0, 1]


def test_counts(sections):
    (facts,) = of_kind(sections, Facts)
    assert facts.facts == {"top-1 of run": 50.0, "top-1 of right": 100.0}
    table = next(each for each in of_kind(sections, Table) if each.heading == "By class: run")
    assert table.rows == [
        ("cat", [3, "33.33", "dog (2)"]),
        ("dog", [1, "100.00", ""]),
        ("owl", [2, "50.00", "cat (1)"]),
    ]
    matrix, _ = of_kind(sections, Matrix)
    assert matrix.counts.tolist() == [[1, 2, 0], [0, 1, 0], [1, 0, 1]]


def test_difference(sections):
    table = next(each for each in of_kind(sections, Table) if "Difference" in each.heading)
    ((metric, (cell,)),) = table.rows
    assert metric == "top1" and cell.startswith("+50.0, 95 % ")


def test_worst_and_best_images(sections):
    gallery, other = of_kind(sections, Gallery)
    # 1: a dog at 0.98; 4: a cat at 0.71. The best image: 3 with 1.0.
    assert [each.name for each in gallery.images] == ["1.png", "4.png", "3.png"]
    assert [each.errors for each in gallery.images] == [["wrong"], ["wrong"], ["right"]]
    assert gallery.images[0].note.startswith("truth: cat; predicted: dog 0.98, cat 0.02")
    assert gallery.images[0].image[0, 0].tolist() == [40, 0, 0]
    assert {each.errors[0] for each in other.images} == {"right"}


def test_damaged_files_are_named(tmp_path):
    file = tmp_path / CLASSIFICATION_FILE
    for text in ("{", '{"class_names": [], "images": [{"label": 0, "classes": [], "scores": []}]}'):
        file.write_text(text)
        (notes,) = classification_sections("pets", {"run": file}, 5, 0, GallerySettings(2))
        assert isinstance(notes, Notes) and str(file) in notes.notes[0]


def test_an_interval_is_that_of_the_theory():
    """The interval of a mean of 400 independent values has 1.96 standard errors on each side."""
    values = np.random.default_rng(0).normal(3, 2, 400)
    middle, lower, upper = paired_interval(
        lambda weights: float(weights @ values / weights.sum()), 400, 2000, 0
    )
    assert middle == pytest.approx(values.mean())
    error = 1.96 * values.std() / 20
    assert lower == pytest.approx(middle - error, abs=0.02)
    assert upper == pytest.approx(middle + error, abs=0.02)
