"""What a launcher adds to a training: its hook's place, evaluations, and who may write."""

import contextlib
import json

import pytest
import torch
from conftest import QUICK, REPOSITORY, metrics_of

from contnet.engine.hooks import LauncherHook
from contnet.launch.arguments import parse_arguments
from contnet.launch.main import run
from contnet.utils.files import WriteGuard

OPTIONS = """
MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32
INPUT.CLASSIFIER.CROP_TEST 32 SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 3 SOLVER.CHECKPOINT_PERIOD 1
TEST.EVAL_PERIOD 2 LOG_PERIOD 1 SOLVER.BASE_LR 0.01 SOLVER.CHECKPOINT_BACKGROUND False
"""


@pytest.fixture
def arguments(imagenet_root, monkeypatch):
    """Arguments of a run of three iterations, which is evaluated after the second and third."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
    file = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")

    def make(folder, *more):
        options = ["--config-file", file, *QUICK, *OPTIONS.split()]
        return parse_arguments([*options, "OUTPUT_DIR", str(folder), *more])

    return make


def evaluated(folder):
    """The iterations that results.json knows."""
    file = folder / "results.json"
    return [each["iteration"] for each in json.loads(file.read_text())] if file.exists() else []


class Observer(LauncherHook):
    """Notes what is on the disk when it is called."""

    def __init__(self, folder):
        self.folder, self.steps, self.evaluations = folder, [], []

    def after_step(self):
        last = (self.folder / "last_checkpoint").read_text()
        self.steps.append((last, metrics_of(self.folder)[-1]["iteration"]))

    @contextlib.contextmanager
    def evaluating(self):
        before = evaluated(self.folder)
        yield
        self.evaluations.append((self.trainer.iter, before, evaluated(self.folder)))


def test_comes_last_and_around_evaluations(arguments, tmp_path):
    observer = Observer(tmp_path / "observed")
    metrics = run(arguments(tmp_path / "observed"), observer)
    names = ["model_0000000.pth", "model_0000001.pth", "model_final.pth"]
    assert observer.steps == [(name, i) for i, name in enumerate(names)]
    assert observer.evaluations == [(1, [], [1]), (2, [1], [1, 2])]
    assert run(arguments(tmp_path / "plain")) == metrics
    assert metrics_of(tmp_path / "plain") == metrics_of(tmp_path / "observed")


class Lost(BaseException):
    """As a launcher would raise."""


def files_of(folder):
    """Contents by name, but of Detectron2's logs."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "log" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


class Limited(WriteGuard):
    """Lets a run write until it has asked a number of times; notes what is there then."""

    writer = "first"

    def __init__(self, folder, allowed):
        self.folder, self.allowed = folder, allowed
        self.asked, self.files = 0, None

    def check(self):
        self.asked += 1
        if self.asked > self.allowed:
            if self.files is None:
                self.files = files_of(self.folder)
            raise Lost


class Guarded(LauncherHook):
    def __init__(self, guard):
        self.guard = guard


def test_nothing_is_written_once_that_is_refused(arguments, tmp_path):
    """Wherever in a run: its record, metrics, checkpoints, results."""
    endless = Limited(tmp_path / "whole", 10**6)
    run(arguments(tmp_path / "whole"), Guarded(endless))
    assert endless.asked > 20
    for allowed in range(0, endless.asked, 5):  # odd: the beginnings and the ends of files
        folder = tmp_path / str(allowed)
        guard = Limited(folder, allowed)
        with pytest.raises(Lost):
            run(arguments(folder), Guarded(guard))
        # What was begun is gone.
        expected = {k: v for k, v in guard.files.items() if not k.endswith(".first.tmp")}
        assert files_of(folder) == expected, allowed


def test_nothing_is_written_in_the_background_either(arguments, tmp_path, monkeypatch):
    """The guard refuses while a checkpoint is half written."""
    guard = Limited(tmp_path, 10**6)
    save = torch.save

    def refused(data, file):
        save(data, file)
        if file.name.endswith("model_0000001.pth.first.tmp"):
            guard.allowed = 0

    monkeypatch.setattr("torch.save", refused)
    hook = Guarded(guard)
    background = ("SOLVER.CHECKPOINT_BACKGROUND", "True")
    with pytest.raises(Lost) as lost:
        run(arguments(tmp_path, *background), hook)
    with contextlib.suppress(Lost):
        hook.trainer.checkpointer.wait()  # lives as long as the traceback
    del lost
    files = files_of(tmp_path)
    checkpoints = sorted(name for name in files if ".pth" in name)
    assert checkpoints == ["model_0000000.pth", "model_best.pth"]
    assert files["last_checkpoint"] == b"model_0000000.pth"


def test_an_evaluation_alone_is_guarded(arguments, tmp_path):
    run(arguments(tmp_path / "trained"))
    weights = ("MODEL.WEIGHTS", str(tmp_path / "trained" / "model_final.pth"))
    for allowed in range(3):
        folder = tmp_path / str(allowed)
        guard = Limited(folder, allowed)
        with pytest.raises(Lost) if allowed < 2 else contextlib.nullcontext():
            run(arguments(folder, *weights, "--eval-only"), Guarded(guard))
        assert (folder / "results.json").exists() == (allowed == 2)
