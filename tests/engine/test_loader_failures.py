"""Tests killed and stopped loader workers, and exhausted memory: each gives one error line."""

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import QUICK, REPOSITORY

from contnet.engine.hooks import LauncherHook
from contnet.launch.arguments import build_run_settings, parse_arguments
from contnet.launch.run import run
from contnet.utils.errors import UserError

RUN = """
MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32
INPUT.CLASSIFIER.CROP_TEST 32 SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 30 TEST.IMS_PER_PROCESS 1
DATALOADER.NUM_WORKERS 1 DATALOADER.TIMEOUT 2 SOLVER.BASE_LR 0.01
"""


@pytest.fixture
def arguments(imagenet_root, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
    file = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
    return ["--config-file", file, *QUICK, *RUN.split(), "OUTPUT_DIR", str(tmp_path / "run")]


class Strikes(LauncherHook):
    """Sends a signal to the loader's workers, in training or before an evaluation's first image."""

    def __init__(self, number):
        self.number = number

    def strike(self, *_):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, self.number)

    def before_step(self):
        if self.trainer.iter == 1:
            self.strike()

    def watch(self, model):
        model.register_forward_pre_hook(self.strike)


def _run(settings, hook, pipe):
    try:
        run(settings, hook)
    except UserError as error:
        pipe.send(str(error))
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(0)  # PyTorch's handler may raise an error for a killed worker at any time


@pytest.mark.parametrize("options", [(), ("--eval-only",)], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGKILL, "out of memory.*DATALOADER.NUM_WORKERS"), (signal.SIGSTOP, "2 s.*TIMEOUT")],
)
def test_workers(arguments, imagenet_root, number, said, options, request):
    if options:
        weights = request.getfixturevalue("trained")
        options = (*options, "MODEL.WEIGHTS", str(weights))
    settings = build_run_settings(parse_arguments([*arguments, *options]))
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_run, args=(settings, Strikes(number), theirs))
    process.start()
    theirs.close()
    assert re.fullmatch(f".*data loader.* worker.*{said}.*", ours.recv())  # one line
    process.join()


class Leaves(Strikes):
    """Leaves while a batch is fetched from a worker, without notice to the worker."""

    def __init__(self, patch):
        self.patch = patch

    def strike(self, *_):
        self.patch.setattr("multiprocessing.connection.answer_challenge", self.leave)

    def leave(self, *_):
        raise UserError("left")


@pytest.mark.parametrize("options", [(), ("--eval-only",)], ids=["training", "evaluation"])
def test_a_worker_that_is_left_prints_nothing(arguments, options, request, capfd, monkeypatch):
    if options:
        options = (*options, "MODEL.WEIGHTS", str(request.getfixturevalue("trained")))
    settings = build_run_settings(parse_arguments([*arguments, *options]))
    try:
        run(settings, Leaves(monkeypatch))
    except UserError as error:
        left = str(error)
    gc.collect()  # ends the workers
    assert left == "left" and not multiprocessing.active_children()
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def trained(imagenet_root, tmp_path_factory):
    """Returns a checkpoint of the classifier."""
    folder = tmp_path_factory.mktemp("trained")
    file = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
    options = [*QUICK, *RUN.split(), "SOLVER.MAX_ITER", "3", "DATASETS.TEST", "()"]
    options += ["OUTPUT_DIR", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
        run(build_run_settings(parse_arguments(["--config-file", file, *options])))
    return folder / "model_final.pth"


LIMITED = """
import re, resource, sys
from pathlib import Path
from contnet.launch.main import main
used = 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_DATA, (used + 600 * 2**20,) * 2)
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_host_memory(arguments, workers):
    """Either the batch or an image does not fit into memory."""
    size = "512" if workers == "0" else "12000"
    options = ["DATALOADER.NUM_WORKERS", workers, "INPUT.CLASSIFIER.SIZE", size]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments, *options, "DATASETS.TEST", "()"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "out of memory" in line and "SOLVER.IMS_PER_BATCH" in line
    assert "Traceback" not in done.stdout + done.stderr
    if workers == "0":
        assert re.search(r"iteration 0, with 4 images of 3x512x512", line)
