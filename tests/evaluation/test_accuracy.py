"""Tests the accuracy of classification against a plain loop."""

import pytest
import torch
from classifiers import config
from torch.utils._python_dispatch import TorchDispatchMode

from contnet.data.datasets.register import register_datasets
from contnet.evaluation.classification import ClassificationEvaluator
from contnet.evaluation.metrics import check_best_metric
from contnet.utils.errors import UserError


@pytest.mark.parametrize("classes", [1, 3, 5, 6, 10])
def test_accuracy_is_that_of_a_plain_loop(classes):
    logits = torch.randn(37, classes)
    labels = torch.randint(0, classes, (37,)).tolist()
    evaluator = ClassificationEvaluator(classes)
    evaluator.reset()
    for start in range(0, 37, 8):
        rows = range(start, min(start + 8, 37))
        evaluator.process(
            [{"label": labels[i]} for i in rows], [{"logits": logits[i]} for i in rows]
        )
    # With five classes or fewer, one of the first five is always right.
    top = {1: 0, 5: 0} if classes > 5 else {1: 0}
    for row, label in zip(logits.tolist(), labels, strict=True):
        order = sorted(range(classes), key=lambda i: -row[i])
        for k in top:
            top[k] += label in order[:k]
    expected = {f"top{k}": 100 * number / 37 for k, number in top.items()}
    assert evaluator.evaluate() == {"classification": expected}
    cfg = config("MODEL.CLASSIFIER.NUM_CLASSES", str(classes), "TEST.BEST_METRIC", "no")
    register_datasets(cfg)
    with pytest.raises(UserError) as caught:
        check_best_metric(cfg)
    assert ("classification/top5" in str(caught.value)) == (classes > 5)


def test_logits_that_are_not_finite_are_wrong_and_named(caplog):
    evaluator = ClassificationEvaluator(3)
    broken = torch.tensor([float("nan"), 1.0, 0.0])
    evaluator.process(
        [{"label": 0}, {"label": 0}], [{"logits": broken}, {"logits": torch.tensor([2.0, 1, 0])}]
    )
    assert evaluator.evaluate()["classification"] == {"top1": 50.0}
    assert "1 of 2 images have logits that are not finite" in caplog.text


class Numbers(TorchDispatchMode):
    """Counts the values that are read one by one, each of which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("folder", ["", "somewhere"])  # a file is written there at the end
def test_a_batch_is_read_at_once(folder):
    with Numbers() as numbers:
        outputs = [{"logits": logits} for logits in torch.eye(10)]
        ClassificationEvaluator(10, folder).process([{"label": i} for i in range(10)], outputs)
    assert numbers.count == 0
