"""Tests Python's garbage collection during and after training."""

import contextlib
import gc

import pytest
from conftest import QUICK, REPOSITORY
from torch.utils.data import DataLoader, Dataset

from contnet.data.pipeline.loader import init_worker
from contnet.engine.hooks import CollectGarbage, LauncherHook
from contnet.launch.arguments import build_run_settings, parse_arguments
from contnet.launch.run import run

OPTIONS = """
MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32
INPUT.CLASSIFIER.CROP_TEST 32 SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 6 SOLVER.BASE_LR 0.01
"""


class Observer(LauncherHook):
    """Records when the whole heap is collected; may fail at the end.

    Args:
        fail_at: iteration in which it fails.
    """

    def __init__(self, fail_at=None):
        self.fail_at = fail_at
        self.collections, self.enabled, self.evaluated = [], [], []

    def before_train(self):
        (hook,) = (each for each in self.trainer._hooks if isinstance(each, CollectGarbage))
        hook.period = 2
        gc.callbacks.append(self.note)

    def note(self, phase, info):
        if phase == "start":
            self.collections.append((self.trainer.iter, info["generation"]))

    def after_step(self):
        self.enabled.append(gc.isenabled())
        if self.trainer.iter == self.fail_at:
            raise ValueError("a fault")

    def after_train(self):
        gc.callbacks.remove(self.note)

    @contextlib.contextmanager
    def evaluating(self):
        self.evaluated.append(gc.isenabled())
        yield


@pytest.fixture
def settings(imagenet_here, tmp_path):
    """Builds the settings of a run of six iterations, evaluated after the last one."""
    file = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
    options = ["--config-file", file, *QUICK, *OPTIONS.split(), "OUTPUT_DIR", str(tmp_path)]
    return build_run_settings(parse_arguments(options))


def test_garbage_is_collected_at_fixed_iterations(settings):
    observer = Observer()
    run(settings, observer)
    assert [each for each in observer.collections if each[0] < 5] == [(1, 2), (3, 2)]
    assert observer.enabled == [False] * 6 and observer.evaluated == [True]
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_python_is_left_as_it_was_after_an_error(settings):
    with pytest.raises(ValueError, match="a fault"):
        run(settings, Observer(fail_at=1))
    assert gc.isenabled() and gc.get_freeze_count() == 0


class Collects(Dataset):
    """Returns whether garbage collection is enabled in the calling process."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return gc.isenabled()


def test_workers_collect_their_own():
    gc.disable()
    try:
        loader = DataLoader(Collects(), num_workers=1, worker_init_fn=init_worker)
        assert next(iter(loader)).tolist() == [True]
    finally:
        gc.enable()
