"""Tests what a launcher adds to training: its hook's position, evaluations, and write access."""

import contextlib
import json
import os

import pytest
import torch
from conftest import QUICK, REPOSITORY, metrics_of

from contnet.engine.hooks import LauncherHook
from contnet.engine.run_record import record_run
from contnet.engine.writers import truncate_metrics
from contnet.evaluation.progress import Progress
from contnet.evaluation.results import truncate_results
from contnet.launch.arguments import build_run_settings, parse_arguments
from contnet.launch.run import run
from contnet.utils.files import WriteGuard

OPTIONS = """
MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32
INPUT.CLASSIFIER.CROP_TEST 32 SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 3 SOLVER.CHECKPOINT_PERIOD 1
TEST.EVAL_PERIOD 2 LOG_PERIOD 1 SOLVER.BASE_LR 0.01 SOLVER.CHECKPOINT_BACKGROUND False
"""


@pytest.fixture
def arguments(imagenet_root, monkeypatch):
    """Builds the settings of a run of three iterations, evaluated after the second and third."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
    file = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")

    def make(folder, *more):
        options = ["--config-file", file, *QUICK, *OPTIONS.split()]
        args = parse_arguments([*options, "OUTPUT_DIR", str(folder), *more])
        return build_run_settings(args)

    return make


def evaluated(folder):
    """Returns the iterations in results.json."""
    file = folder / "results.json"
    return [each["iteration"] for each in json.loads(file.read_text())] if file.exists() else []


class Observer(LauncherHook):
    """Records the files on the disk when it is called."""

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
    """An exception of a launcher."""


def files_of(folder):
    """Returns contents by name, except logs and TensorBoard's file, which a thread writes."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    kept = {name: path for name, path in files.items() if not name.startswith(("log", "events"))}
    return {name: path.read_bytes() for name, path in kept.items()}


class Lease(WriteGuard):
    """A lease that can be lost; it records the files at that time."""

    writer = "first"

    def __init__(self, folder):
        self.folder, self.files = folder, None

    def lose(self):
        if self.files is None:
            self.files = files_of(self.folder)

    def check(self):
        if self.files is not None:
            raise Lost

    def assert_nothing_changed(self):
        """Allows only for a partly written file, which is removed."""
        kept = {k: v for k, v in self.files.items() if not k.endswith(".first.tmp")}
        assert files_of(self.folder) == kept


class Loses(LauncherHook):
    """Loses the lease at a given point of the second iteration."""

    def __init__(self, folder, moment=""):
        self.guard, self.moment = Lease(folder), moment

    def _at(self, moment):
        if moment == self.moment and self.trainer.iter == 1:
            self.guard.lose()

    def before_step(self):
        self._at("step")

    @contextlib.contextmanager
    def evaluating(self):
        self._at("evaluation")
        yield

    def after_step(self):
        self._at("end")


RARE = ("LOG_PERIOD", "100", "TEST.EVAL_PERIOD", "0")


@pytest.mark.parametrize(
    ("moment", "options"),
    [
        ("step", ("TEST.EVAL_PERIOD", "0")),  # before the metrics
        ("step", RARE),  # before a checkpoint
        ("evaluation", ()),  # before results.json
        ("end", ()),
    ],
)
def test_nothing_is_written_after_the_loss(arguments, tmp_path, moment, options):
    hook = Loses(tmp_path, moment)
    with pytest.raises(Lost):
        run(arguments(tmp_path, *options), hook)
    hook.guard.assert_nothing_changed()


@pytest.mark.parametrize("background", ["False", "True"])
def test_a_loss_in_a_checkpoint(arguments, tmp_path, monkeypatch, background):
    """The previous checkpoint stays the last one."""
    hook = Loses(tmp_path)
    save = torch.save

    def losing(data, file):
        save(data, file)
        if file.name.endswith("model_0000001.pth.first.tmp"):
            hook.guard.lose()

    monkeypatch.setattr("torch.save", losing)
    with pytest.raises(Lost):
        run(arguments(tmp_path, "SOLVER.CHECKPOINT_BACKGROUND", background), hook)
    files = files_of(tmp_path)
    checkpoints = sorted(name for name in files if ".pth" in name)
    assert checkpoints == ["model_0000000.pth"]
    assert files["last_checkpoint"] == b"model_0000000.pth"
    if background == "False":
        hook.guard.assert_nothing_changed()


def test_a_loss_between_a_checkpoint_and_its_note(arguments, tmp_path, monkeypatch):
    hook = Loses(tmp_path)
    replace = os.replace

    def losing(source, target):
        replace(source, target)
        if str(target).endswith("model_0000001.pth"):
            hook.guard.lose()

    monkeypatch.setattr("os.replace", losing)
    with pytest.raises(Lost):
        run(arguments(tmp_path), hook)
    assert (tmp_path / "model_0000001.pth").exists()
    hook.guard.assert_nothing_changed()


class Cut(LauncherHook):
    """Ends a run that has one more iteration of metrics than its last checkpoint."""

    def after_step(self):
        if self.trainer.iter == 1:
            raise InterruptedError


def test_a_resume_that_comes_too_late(arguments, tmp_path):
    """It neither truncates metrics nor removes files that another attempt is writing."""
    with pytest.raises(InterruptedError):
        run(arguments(tmp_path, "SOLVER.CHECKPOINT_PERIOD", "3"), Cut())
    (tmp_path / "model_0000000.pth.second.tmp").write_text("half")
    (tmp_path / "results.json").write_text(json.dumps([]))
    hook = Loses(tmp_path)
    hook.guard.lose()
    with pytest.raises(Lost):
        run(arguments(tmp_path, "SOLVER.CHECKPOINT_PERIOD", "3", "--resume"), hook)
    hook.guard.assert_nothing_changed()


@pytest.mark.parametrize(
    "write",
    [
        lambda cfg, guard: truncate_metrics(cfg.OUTPUT_DIR, Progress(0), guard),
        lambda cfg, guard: truncate_results(cfg.OUTPUT_DIR, Progress(0), guard),
        lambda cfg, guard: record_run(cfg, 1, 0, guard),
    ],
    ids=["metrics", "results", "record"],
)
def test_each_file_of_a_start_is_guarded(arguments, tmp_path, write):
    settings = arguments(tmp_path)
    run(settings)
    guard = Lease(tmp_path)
    guard.lose()
    with pytest.raises(Lost):
        write(settings.cfg, guard)
    guard.assert_nothing_changed()


def test_an_evaluation_alone_is_guarded(arguments, tmp_path):
    run(arguments(tmp_path / "trained"))
    weights = ("MODEL.WEIGHTS", str(tmp_path / "trained" / "model_final.pth"))
    hook = Loses(tmp_path / "alone")
    hook.guard.lose()
    with pytest.raises(Lost):
        run(arguments(tmp_path / "alone", *weights, "--eval-only"), hook)
    assert not (tmp_path / "alone" / "results.json").exists()


def test_an_evaluation_alone_can_be_watched(arguments, tmp_path):
    """Otherwise, nothing shows that a long evaluation makes progress."""

    class Watches(LauncherHook):
        calls = 0

        def watch(self, model):
            model.register_forward_pre_hook(self._count)

        def _count(self, *_):
            self.calls += 1

    run(arguments(tmp_path / "trained"))
    weights = ("MODEL.WEIGHTS", str(tmp_path / "trained" / "model_final.pth"))
    hook = Watches()
    run(arguments(tmp_path / "alone", *weights, "--eval-only"), hook)
    assert hook.calls > 0
