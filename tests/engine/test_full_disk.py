"""Tests runs whose disk is full, whose folder is gone, or whose files are damaged."""

import json
import logging
import os
import shutil
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SMALL, metrics_of
from damages import DAMAGES, damage
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from contnet.launch.main import main
from contnet.slurm.attempt_folder import AttemptFolder
from contnet.slurm.cluster import Job
from contnet.slurm.lease import Lease
from contnet.slurm.watcher import Watcher
from contnet.utils.errors import UserError

OPTIONS = """
MODEL.META_ARCHITECTURE DiskToy SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 24 LOG_PERIOD 1
SOLVER.CHECKPOINT_PERIOD 8 TEST.EVAL_PERIOD 12 DATASETS.CHECK_IMAGES none
"""
# Called in the forward pass of an iteration, or of an evaluation (-1).
FAULTS: dict[int, Callable[[], None]] = {}


@META_ARCH_REGISTRY.register()
class DiskToy(nn.Module):
    """Learns the mean of its images; detects one box in each."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3)

    def forward(self, batch):
        if fault := FAULTS.pop(get_event_storage().iter if self.training else -1, None):
            fault()
        means = [self.backbone(x["image"][None] / 255).square().mean() for x in batch]
        if self.training:
            return {"loss_mean": torch.stack(means).mean()}
        return [{"instances": self.detect(x)} for x in batch]

    def detect(self, image):
        found = Instances((image["height"], image["width"]))
        found.pred_boxes = Boxes(torch.tensor([[4.0, 4, 20, 20]]))
        found.scores, found.pred_classes = torch.tensor([0.5]), torch.tensor([0])
        return found


@pytest.fixture
def here(coco_here):
    FAULTS.clear()
    return coco_here


@pytest.fixture
def disk(here):
    """Mounts a disk of 512 KiB."""
    folder = here / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    try:
        failed = subprocess.run(mount, capture_output=True).returncode
    except FileNotFoundError:
        failed = True
    if failed:
        pytest.skip("a small disk can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def train(capfd):
    """Trains in a folder; returns the status and the lines on stderr."""

    def run(folder: Path, *more: str) -> tuple[int, list[str]]:
        capfd.readouterr()
        file = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
        status = main(
            ["--config-file", file, *SMALL, *OPTIONS.split(), "OUTPUT_DIR", str(folder), *more]
        )
        output, errors = capfd.readouterr()
        assert "Traceback" not in output
        return status, [line for line in errors.splitlines() if "No CUDA runtime" not in line]

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Makes a folder for an undisturbed run."""
    return tmp_path_factory.mktemp("runs")


def fill(disk: Path, left: int = 0) -> None:
    """Fills a disk, except for some pages."""
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(file.tell() - 4096 * left, 0))


def same(run: Path, other: Path) -> None:
    """Checks that two runs ended with the same weights, metrics and results."""
    ours, theirs = (torch.load(each / "model_final.pth")["model"] for each in (run, other))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert metrics_of(run) == metrics_of(other)
    assert json.loads((run / "results.json").read_text()) == json.loads(
        (other / "results.json").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("iteration", "left", "file"),
    [
        (15, 2, "model_0000015.pth"),
        (-1, 0, "coco_instances_results.json"),
        (-1, 1, "results.json"),
        (-1, 3, "metrics.json"),
    ],
)
def test_a_full_disk_costs_nothing_that_was_saved(runs, disk, train, iteration, left, file):
    FAULTS[iteration] = lambda: fill(disk, left)
    status, (*warnings, error) = train(disk / "run")
    assert status == 1 and error.startswith("error: ")
    assert f"{disk}/run" in error and file in error
    assert "No space left on device: 0.0 MiB are free there" in error
    assert all("log.txt cannot be written" in line for line in warnings)
    text = (disk / "run" / "metrics.json").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert text.endswith("\n") and len(lines) >= iteration
    last = (disk / "run" / "last_checkpoint").read_text()
    assert torch.load(disk / "run" / last)["trainer"]["iteration"] >= 7
    (disk / "filler").unlink()
    assert train(disk / "run", "--resume") == (0, [])
    if not (runs / "undisturbed").exists():
        assert train(runs / "undisturbed") == (0, [])
    same(disk / "run", runs / "undisturbed")


@pytest.mark.long
def test_a_full_disk_in_two_processes(disk, train_net):
    """Each process's errors end in one line, without further messages from Python."""
    fill(disk, left=1)
    options = (
        "--config-file configs/faster_rcnn_contti.yaml --num-gpus 2 DATASETS.CHECK_IMAGES none"
    )
    process = train_net(options, "OUTPUT_DIR", str(disk / "run"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in output and "Exception ignored" not in output
    assert [line for line in output.splitlines() if "error: " in line and str(disk) in line]


def test_a_disk_that_is_full_at_the_start(disk, train):
    fill(disk)
    status, (*_, error) = train(disk / "run")
    assert status == 1 and error.startswith("error: ")
    assert f"{disk}/run" in error and "MiB are free there" in error


def _fail_a_rank(disk: Path, said: Path) -> None:
    """Runs in a separate process and never returns; signals and timers are the watcher's."""
    status = 1
    try:
        logging.getLogger("contnet").addHandler(logging.FileHandler(said))
        job = Job("local", "5")
        folder = AttemptFolder(disk, "5", 0)
        watcher = Watcher(job, folder, Lease(disk, job), 100, 10, 0.1, lambda reason: 1)
        watcher.start()
        fill(disk)
        watcher.fail(UserError("it broke"))
        status = 0
    except BaseException as error:
        said.write_text("".join(traceback.format_exception(error)))
    finally:
        os._exit(status)


def test_a_job_says_why_it_ends_though_it_cannot_note_it(disk, tmp_path):
    if not (child := os.fork()):
        _fail_a_rank(disk, tmp_path / "said")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = (tmp_path / "said").read_text()
    assert status == 0, said
    assert "it broke" in said and "No space left on device" in said and "Traceback" not in said


def test_a_log_that_cannot_be_written_ends_no_training(here, train):
    (here / "run").mkdir()
    (here / "run" / "log.txt").symlink_to("/dev/full")
    status, lines = train(here / "run")
    assert status == 0 and len(lines) == 1
    assert lines[0].startswith("warning: ") and "run/log.txt cannot be written" in lines[0]
    assert len(metrics_of(here / "run")) == 24


@pytest.mark.parametrize(
    ("iteration", "delete"), [(3, True), (7, False), (-1, True)], ids=["deleted", "moved", "late"]
)
def test_a_folder_that_has_gone(here, train, iteration, delete):
    folder = here / "run"
    go = shutil.rmtree if delete else lambda path: path.rename(here / "elsewhere")
    FAULTS[iteration] = lambda: go(folder)
    status, (*_, error) = train(folder)
    assert status == 1 and error.startswith("error: ")
    assert str(folder) in error and "was it moved or deleted?" in error
    assert not folder.exists()


@pytest.mark.parametrize("content", ["zeros", "a folder"])
def test_a_resume_sets_damaged_files_aside(here, train, content):
    names = ("run.json", "metrics.json", "results.json")
    assert train(here / "run", "SOLVER.MAX_ITER", "12") == (0, [])
    for name in names:
        damage(here / "run" / name, DAMAGES[content])
    assert train(here / "run", "--resume") == (0, [])
    log = (here / "run" / "log.txt").read_text()
    for name in names:
        assert (here / "run" / "set_aside" / name).exists()
        assert log.count(str(here / "run" / "set_aside" / name)) == 1
    assert [line["iteration"] for line in metrics_of(here / "run")] == list(range(12, 24))
