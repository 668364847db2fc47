"""Tests the demonstrations without training: they must find nothing, and report that."""

import json

import pytest

from contnet.commands import demo, demo_imagenet
from contnet.commands.demo import REQUIRED_AP, main
from contnet.data.datasets.shapes import make_shapes
from contnet.data.datasets.shapes_drawing import CLASS_NAMES

ONLY = ["SOLVER.WARMUP_ITERS", "0"]  # the demonstration's warm-up is longer than the run


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Makes both demonstrations draw fewer images."""

    def make_few(root, **options):
        return make_shapes(root, **{**options, "num_train": 24, "num_val": 12})

    for module in (demo, demo_imagenet):
        monkeypatch.setattr(module, "make_shapes", make_few)


@pytest.mark.slow
def test_an_untrained_detector_fails_the_demonstration(tmp_path, capsys):
    status = main(["--output", str(tmp_path), "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()"])
    printed = capsys.readouterr()
    *_, ap_line, page_line = printed.out.strip().splitlines()
    assert ap_line.startswith("box AP ")
    assert 0 <= float(ap_line.removeprefix("box AP ")) < 1 < REQUIRED_AP
    assert page_line == f"page {tmp_path / 'report.html'}"
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert status == 1
    assert "box AP is below 60" in printed.err
    (record,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert record["iteration"] == 0 and record["metrics"]["bbox"]["AP"] < 1


@pytest.mark.slow
def test_an_untrained_classifier_fails_its_demonstration(tmp_path, capsys):
    status = demo_imagenet.main(["--output", str(tmp_path), "SOLVER.MAX_ITER", "1", *ONLY])
    printed = capsys.readouterr()
    *_, line = printed.out.strip().splitlines()
    assert float(line.removeprefix("top-1 ")) < 60 < demo_imagenet.REQUIRED_TOP1
    assert status == 1
    assert "top-1 is below 90" in printed.err
    folders = sorted(path.name for path in (tmp_path / "pictures" / "val").iterdir())
    assert folders == sorted(CLASS_NAMES)
