"""Tests REPORT.ENABLED: the page that training refreshes."""

import os
import re
from types import SimpleNamespace

import pytest
from conftest import QUICK
from leaves import CONFIGS, SYSTEMS, TINY

from contnet.engine.hooks import RefreshReport
from contnet.launch.main import main
from contnet.utils.files import WriteGuard

NAME = "imagenet/contti_strong"


def train(folder, *options):
    words = [*QUICK, *TINY, *SYSTEMS[NAME][0].split(), "MODEL.CLASSIFIER.NUM_CLASSES", "7"]
    words += ["SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "2", "OUTPUT_DIR", str(folder), *options]
    return main(["--config-file", str(CONFIGS / f"{NAME}.yaml"), *words])


def test_a_training_leaves_its_page(imagenet_here, tmp_path):
    assert train(tmp_path, "REPORT.ENABLED", "True") == 0
    html = (tmp_path / "report.html").read_text()
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert headings[0] == "Results: imagenet_val" and "Curves" in headings
    assert "<td>4</td>" in html  # the last evaluation is included
    assert [path.name for path in tmp_path.glob("report*")] == ["report.html"]


def test_a_page_that_cannot_be_written_ends_no_training(imagenet_here, tmp_path):
    (tmp_path / "report.html").mkdir()
    assert train(tmp_path, "REPORT.ENABLED", "True") == 0
    log = (tmp_path / "log.txt").read_text()
    assert f"page is not updated: {tmp_path / 'report.html'} cannot be written" in log
    assert (tmp_path / "model_final.pth").exists()


def hook_at(tmp_path, iteration, guard=None):
    hook = RefreshReport(str(tmp_path), 10, guard or WriteGuard())
    hook.trainer = SimpleNamespace(iter=iteration, max_iter=100)
    return hook


def test_a_refresh_waits_until_the_earlier_ones_are_two_percent(tmp_path):
    hook = hook_at(tmp_path, 9)
    page = tmp_path / "report.html"
    hook.after_step()
    assert page.exists()
    os.remove(page)
    hook.start -= 10 * hook.seconds  # simulates that much time
    hook.trainer.iter = 19
    hook.after_step()
    assert not page.exists()
    hook.start -= 60 * hook.seconds
    hook.after_step()
    assert page.exists()
    os.remove(page)
    hook.start, hook.trainer.iter = hook.start + 1e6, 99
    hook.after_step()
    assert page.exists()


def test_between_evaluations_nothing_is_written(tmp_path):
    hook_at(tmp_path, 10).after_step()
    assert not list(tmp_path.iterdir())


def test_who_may_not_write_does_not(tmp_path):
    class Lost(Exception):
        pass

    class Guard(WriteGuard):
        def check(self):
            raise Lost

    with pytest.raises(Lost):
        hook_at(tmp_path, 9, Guard()).after_step()
    assert not list(tmp_path.iterdir())
