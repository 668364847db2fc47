"""Tests that killed and resumed runs are bit for bit equal to uninterrupted ones.

The runs are real processes; classifiers of every family and recipe run in this process.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from conftest import QUICK, REPOSITORY, finish, metrics_of

from contnet.engine.hooks import LauncherHook
from contnet.launch.arguments import build_run_settings, parse_arguments
from contnet.launch.run import run

ITERATIONS = 10
LEAF = "--config-file configs/faster_rcnn_contti.yaml"

EVERYTHING = """
SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.9 SOLVER.GRAD_ACCUM_STEPS 2 SOLVER.AMP.ENABLED True
SOLVER.AMP.DTYPE bfloat16 SOLVER.OPTIMIZER AdamW SOLVER.BASE_LR 0.0001
MODEL.CONTNET.DROP_PATH_RATE 0.2 MODEL.CONTNET.DROP_RATE 0.1 DATALOADER.NUM_WORKERS 1
SOLVER.LR_SCHEDULER_NAME WarmupCosineLR
"""
RUNNING = """
MODEL.CONTNET.NORM BN MODEL.CONTNET.DROP_PATH_RATE 0.2 MODEL.FPN.OUT_CHANNELS 64
TEST.EVAL_PERIOD 4
"""
SMALL_CROPS = """
INPUT.MIN_SIZE_TRAIN (64,96) INPUT.CROP.SIZE (48,64) MODEL.SEM_SEG_HEAD.CONVS_DIM 16
MODEL.PSP_HEAD.AUX_CONVS_DIM 16
"""
IMAGES = """
MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 56 INPUT.CLASSIFIER.RESIZE_TEST 64
INPUT.CLASSIFIER.CROP_TEST 56 INPUT.CLASSIFIER.RANDOM_ERASING 0.5 SOLVER.EMA.ENABLED True
SOLVER.EMA.DECAY 0.9 SOLVER.IMS_PER_BATCH 8 SOLVER.GRAD_ACCUM_STEPS 2 DATALOADER.NUM_WORKERS 1
TEST.IMS_PER_PROCESS 4
"""
SETTINGS = {
    "one process": (f"{LEAF} --num-gpus 1", ["DATALOADER.NUM_WORKERS", "2"]),
    "two processes, running loss normaliser": (
        "--config-file configs/fcos_contti.yaml --num-gpus 2",
        RUNNING.split(),
    ),
    "two processes": (
        f"{LEAF} --num-gpus 2",
        ["MODEL.CONTNET.NORM", "BN", "TEST.EVAL_PERIOD", "4"],
    ),
    "everything": (f"{LEAF} --num-gpus 1", EVERYTHING.split()),
    "cityscapes masks": (
        "--config-file configs/cityscapes/mask_rcnn_contti.yaml",
        ["MODEL.CONTNET.NORM", "GN", "SOLVER.BASE_LR", "0.001"],
    ),
    "cityscapes classes, norms over two processes": (
        "--config-file configs/cityscapes/pspnet_contti.yaml --num-gpus 2",
        SMALL_CROPS.split(),
    ),
    "mixed images": (
        "--config-file configs/imagenet/contti_strong.yaml --num-gpus 2",
        IMAGES.split(),
    ),
}


def _options(folder: Path) -> list[str]:
    return f"""SOLVER.MAX_ITER {ITERATIONS} SOLVER.STEPS (6,) SOLVER.CHECKPOINT_PERIOD 3
    TEST.EVAL_PERIOD 5 LOG_PERIOD 2 OUTPUT_DIR {folder} TEST.DETECTIONS_PER_IMAGE 1000
    MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0""".split()


def _is_stopped(group: int) -> bool:
    """Returns whether no process of a group is running."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = file.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "TZ":
                return False
    return True


def _copy_after(
    process: subprocess.Popen, folder: Path, copy: Path, checkpoint: str, iteration: int
) -> None:
    """Copies the folder as SIGKILL would leave it, while all processes are stopped.

    The copy is made when the run has ``checkpoint`` or a later one, and an iteration's metrics;
    a run that never has is killed.
    """
    last, further = folder / "last_checkpoint", folder / "metrics.json"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        lines = further.read_text().splitlines() if further.exists() else []
        saved = last.exists() and last.read_text() >= checkpoint
        if saved and lines and json.loads(lines[-1])["iteration"] >= iteration:
            os.killpg(process.pid, signal.SIGSTOP)
            while not _is_stopped(process.pid):
                time.sleep(0.001)
            shutil.copytree(folder, copy)
            os.killpg(process.pid, signal.SIGCONT)
            return
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _checkpoint(folder, name) -> dict:
    """Loads a checkpoint, without the folder in its config."""
    content = torch.load(folder / name)
    config = yaml.safe_load(content["contnet"]["config"])
    assert Path(config.pop("OUTPUT_DIR")).is_dir()
    content["contnet"]["config"] = config
    return content


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


class Trainings:
    """Training runs of a setting, each of which is run once for all tests."""

    def __init__(self, train_net, datasets: dict[str, Path], folder: Path):
        self.train_net, self.datasets, self.folder = train_net, datasets, folder
        self.outputs = {}

    def start(
        self, setting: str, folder: Path, *options: str, launch: str = ""
    ) -> subprocess.Popen:
        """Starts a run with a setting's options and further options."""
        usual, more = SETTINGS[setting]
        data = next((root for name, root in self.datasets.items() if name in usual), None)
        environment = {"DETECTRON2_DATASETS": str(data)} if data else {}
        more = [*_options(folder), *more, *options]
        return self.train_net(f"{usual} {launch}", *more, **environment)

    def uncut(self, setting: str) -> tuple[Path, str]:
        """Returns the folder and the output of an undisturbed run."""
        folder = self.folder / str(list(SETTINGS).index(setting)) / "uncut"
        if setting not in self.outputs:
            process = self.start(setting, folder)
            with ThreadPoolExecutor(1) as pool:
                # A run blocks if it prints to a full pipe.
                output = pool.submit(finish, process)
                # Checkpoints follow iterations 2, 5, 8: copied after iteration 7, off both periods.
                _copy_after(process, folder, folder.with_name("cut"), "model_0000005.pth", 7)
                self.outputs[setting] = output.result()
        return folder, self.outputs[setting]

    def killed(self, setting: str, copy: Path) -> None:
        """Copies the folder as it would be if the undisturbed run had been killed."""
        folder, _ = self.uncut(setting)
        shutil.copytree(folder.with_name("cut"), copy)


@pytest.fixture(scope="module")
def trainings(train_net, cityscapes_root, imagenet_root, tmp_path_factory) -> Trainings:
    datasets = {"cityscapes": cityscapes_root, "imagenet": imagenet_root}
    return Trainings(train_net, datasets, tmp_path_factory.mktemp("trainings"))


def _params() -> list:
    """Returns the settings; those that have little of their own are marked as long."""
    rare = (
        "two processes",
        "cityscapes masks",
        "cityscapes classes, norms over two processes",
        "mixed images",
    )
    return [
        pytest.param(each, marks=pytest.mark.long if each in rare else pytest.mark.slow)
        for each in SETTINGS
    ]


@pytest.mark.parametrize("setting", _params())
def test_killed_and_resumed_equals_uncut(trainings, tmp_path, setting):
    launch, _ = SETTINGS[setting]
    uncut, output = trainings.uncut(setting)
    assert ("naiveSyncBN is used instead" in output) == ("pspnet" in launch)

    cut = tmp_path / "cut"
    trainings.killed(setting, cut)
    # A periodic checkpoint, or the one before the evaluation after iteration 7.
    last = (cut / "last_checkpoint").read_text()
    assert last in ("model_0000005.pth", "model_0000007.pth", "model_0000008.pth")
    if setting == "one process":  # killed while writing a line
        with open(cut / "metrics.json", "a") as file:
            file.write('{"iteration": 8, "total_lo')
    finish(trainings.start(setting, cut, launch="--resume"))

    expected, found = metrics_of(uncut), metrics_of(cut)
    assert [line["iteration"] for line in found] == [line["iteration"] for line in expected]
    # As text, because nan does not equal itself.
    assert list(map(repr, found)) == list(map(repr, expected))
    mains = {"pspnet": "sem_seg/IoU", "imagenet": "classification/top1"}
    main = next((metric for name, metric in mains.items() if name in launch), "bbox/AP")
    assert any(main in line for line in expected)
    for name in ("model_final.pth", "model_best.pth"):
        assert _same(*(_checkpoint(folder, name) for folder in (uncut, cut)))
    results = [(folder / "results.json").read_text() for folder in (uncut, cut)]
    assert results[0] == results[1]
    task, metric = main.split("/")
    values = [each["metrics"][task][metric] for each in json.loads(results[0])]
    assert len(values) > 1 and (any(values) or "faster_rcnn" not in launch)


@pytest.mark.slow
def test_other_number_of_processes_keeps_the_count_of_images(trainings, tmp_path):
    setting = "two processes, running loss normaliser"
    trainings.killed(setting, tmp_path / "cut")
    process = trainings.start(setting, tmp_path / "cut", launch="--num-gpus 1 --resume")
    assert "order is not that" not in finish(process)
    assert metrics_of(tmp_path / "cut")[-1]["images_seen"] == 2 * ITERATIONS


@pytest.mark.slow
def test_other_number_of_workers_changes_nothing(trainings, tmp_path):
    two, _ = trainings.uncut("one process")
    finish(trainings.start("one process", tmp_path, "DATALOADER.NUM_WORKERS", "0"))
    assert list(map(repr, metrics_of(two))) == list(map(repr, metrics_of(tmp_path)))


# --- every family and recipe of classifiers ------------------------------------------------------

FEW_OPTIONS = """
MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32
INPUT.CLASSIFIER.CROP_TEST 32 SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 4 SOLVER.CHECKPOINT_PERIOD 2
TEST.EVAL_PERIOD 2 LOG_PERIOD 1 SOLVER.WARMUP_FACTOR 0.1
"""
AVERAGED = "SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.5"
# All strong recipes mix images; contti_strong's run with two processes is above.
CLASSIFIERS = {
    "contti": "SOLVER.BASE_LR 0.01",
    "contti_strong": AVERAGED,
    "res18": "MODEL.CLASSIFIER.DROP_PATH_RATE 0.2",
    "deit_ti_strong": AVERAGED,
}


class Cut(LauncherHook):
    """Ends a run between two checkpoints."""

    def after_step(self):
        if self.trainer.iter == 2:
            raise InterruptedError


@pytest.mark.parametrize("leaf", CLASSIFIERS)
def test_a_classifier_that_was_cut_equals_uncut(imagenet_root, monkeypatch, tmp_path, leaf):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    file = str(REPOSITORY / "configs" / "imagenet" / f"{leaf}.yaml")
    options = ["--config-file", file, *QUICK, *FEW_OPTIONS.split(), *CLASSIFIERS[leaf].split()]

    def settings(folder, *more):
        args = parse_arguments([*options, "OUTPUT_DIR", str(folder), *more])
        return build_run_settings(args)

    run(settings(uncut))
    with pytest.raises(InterruptedError):
        run(settings(cut), Cut())
    assert (cut / "last_checkpoint").read_text() == "model_0000001.pth"
    assert [line["iteration"] for line in metrics_of(cut)] == [0, 1, 2]
    run(settings(cut, "--resume"))

    expected = metrics_of(uncut)
    assert metrics_of(cut) == expected and len(expected) == 4
    assert len({line["total_loss"] for line in expected}) == 4
    states = [_checkpoint(folder, "model_final.pth") for folder in (uncut, cut)]
    assert _same(*states) and ("ema" in states[0]) == (CLASSIFIERS[leaf] == AVERAGED)
    assert (cut / "results.json").read_text() == (uncut / "results.json").read_text()


class Stopped(BaseException):
    """Ends a run in an evaluation, like a signal."""


class StopInEvaluation(LauncherHook):
    """Leaves the first evaluation."""

    @contextlib.contextmanager
    def evaluating(self):
        if self.trainer.start_iter == 0:
            raise Stopped
        yield


EVERY = "TEST.EVAL_PERIOD 2 SOLVER.MAX_ITER 5 LOG_PERIOD 1"


def classifier_settings(folder, *more):
    """Builds the settings of a classifier's run that is evaluated in the middle and at the end."""
    file = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
    options = ["--config-file", file, *QUICK, *FEW_OPTIONS.split(), *EVERY.split()]
    args = parse_arguments([*options, "OUTPUT_DIR", str(folder), *more])
    return build_run_settings(args)


def test_a_run_that_ended_in_an_evaluation_equals_uncut(imagenet_root, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    run(classifier_settings(uncut))
    with pytest.raises(Stopped):
        run(classifier_settings(cut), StopInEvaluation())
    assert (cut / "last_checkpoint").read_text() == "model_0000001.pth"
    run(classifier_settings(cut, "--resume"), StopInEvaluation())
    assert metrics_of(cut) == metrics_of(uncut)
    assert _same(*(_checkpoint(folder, "model_final.pth") for folder in (uncut, cut)))
    results = [(folder / "results.json").read_text() for folder in (uncut, cut)]
    assert results[0] == results[1]


def test_an_average_that_a_checkpoint_does_not_have(imagenet_root, monkeypatch, tmp_path):
    """The EMA starts from the resumed weights, not from the initial weights of the model."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
    on = ("SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.9999")
    run(classifier_settings(tmp_path))
    before = torch.load(tmp_path / "model_final.pth")["model"]
    run(classifier_settings(tmp_path, *on, "SOLVER.MAX_ITER", "6", "--resume"))
    assert "has no EMA: the EMA starts from the last weights" in (tmp_path / "log.txt").read_text()
    average = torch.load(tmp_path / "model_final.pth")["ema"]
    for name, value in before.items():  # one step has moved it by 1e-4 of the change
        if value.is_floating_point() and "running" not in name:
            assert torch.allclose(average[f"module.{name}"], value, rtol=1e-3, atol=1e-3), name
    run(classifier_settings(tmp_path, "SOLVER.MAX_ITER", "7", "--resume"))
    assert "has an EMA, which is discarded" in (tmp_path / "log.txt").read_text()
    assert "ema" not in torch.load(tmp_path / "model_final.pth")
