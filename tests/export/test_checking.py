"""Tests the comparison of an export with its model: what passes and what fails."""

import pytest
import torch

from contnet.export.checking import Check, compare

IMAGES = torch.zeros(1, 3, 100, 200)
DETECTOR = ("boxes", "scores", "classes")


def detections():
    """Returns three detections of a class, and one of another class at the place of the first."""
    boxes = torch.tensor([[0, 0, 50, 50], [100, 0, 150, 50], [0, 60, 30, 90], [0, 0, 50, 50]])
    return [boxes.float(), torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([0, 0, 0, 1])]


def check_of(found, expected, names=DETECTOR, tolerance=1e-3):
    check = Check(tolerance)
    compare(check, names, found, expected, IMAGES)
    return check


def test_equal_detections():
    check = check_of(detections(), detections())
    assert check.passed and check.difference == 0 and check.detections == 4


def test_the_difference_of_boxes_is_a_share_of_the_image():
    found = detections()
    found[0][1] += 1.0
    check = check_of(found, detections())
    assert check.difference == pytest.approx(1 / 200) and not check.passed
    found = detections()
    found[1][2] += 0.05
    check = check_of(found, detections())
    assert check.difference == pytest.approx(0.05) and not check.passed


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_detection_that_is_missing(missing):
    kept = [i for i in range(4) if i != missing]
    fewer = [each[kept] for each in detections()]
    for found, expected in ((fewer, detections()), (detections(), fewer)):
        check = check_of(found, expected)
        assert check.unmatched == 1 and check.detections == 3 and not check.passed


def test_another_class():
    found = detections()
    found[2][1] = 1
    assert check_of(found, detections()).unmatched == 2


def test_equals_in_another_order():
    expected = detections()
    expected[1][:3] = 0.8
    found = [each[[2, 0, 1, 3]] for each in expected]
    assert check_of(found, expected).passed


def test_the_choice_between_equals_at_the_end():
    """The number of detections is limited; with two equal last scores, either may be kept."""
    found, expected = detections(), detections()
    found[0][3] = torch.tensor([150.0, 50, 190, 90])
    check = check_of(found, expected)
    assert check.passed and check.unmatched == 0 and check.detections == 3


def test_masks_are_compared():
    names, masks = (*DETECTOR, "masks"), torch.rand(4, 28, 28)
    found, expected = [*detections(), masks.clone()], [*detections(), masks]
    assert check_of(found, expected, names).passed
    found[3][1, 3, 3] += 0.2
    check = check_of(found, expected, names)
    assert check.difference == pytest.approx(0.2)


def test_nothing_is_found():
    none = [torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)]
    assert check_of(none, none).passed
    assert check_of(none, detections()).unmatched == 3  # the last one may be below the threshold


@pytest.mark.parametrize("names", [("logits",), ("semantic",), ("res2",)])
def test_tensors(names):
    expected = torch.tensor([[1.0, -4.0, 2.0]])
    assert check_of([expected], [expected], names).passed
    check = check_of([expected + torch.tensor([0.0, 0.0, 0.4])], [expected], names)
    assert check.difference == pytest.approx(0.1) and not check.passed
    for wrong in (torch.full((1, 3), torch.nan), expected[:, :2]):
        check = check_of([wrong], [expected], names)
        compare(check, names, [expected], [expected], IMAGES)  # correct output changes nothing
        assert not check.passed


def test_the_best_class_of_classifiers():
    expected = torch.eye(4)[:, :3] * 0.01
    found = expected.clone()
    found[0] = torch.tensor([0.0, 0.001, 0.0])
    check = check_of([found], [expected], ("logits",), tolerance=10)
    assert check.same_top1 == 0.75 and not check.passed
    assert "75.0%" in check.describe()
