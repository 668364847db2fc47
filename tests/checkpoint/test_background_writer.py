"""Tests checkpoints written in the background: exact, in order, complete, and no error is lost."""

import io
import logging
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from detectron2.engine import TrainerBase
from timm.utils import ModelEmaV3
from torch import nn

from contnet.checkpoint.background_writer import HostCopy
from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.names import BEST
from contnet.engine.hooks import BestCheckpoint, Evaluation, PeriodicCheckpoint
from contnet.utils.errors import UserError

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]


def as_file(data):
    """Returns the bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(data, file)
    return file.getvalue()


@pytest.fixture
def slow_copies(monkeypatch):
    """Makes the thread's copies slow."""
    finish = HostCopy.finish
    monkeypatch.setattr(HostCopy, "finish", lambda self: (time.sleep(0.1), finish(self)))


@contextmanager
def held_writes(monkeypatch):
    """Keeps checkpoints from being written to their files until the block ends."""
    gate, save = threading.Event(), torch.save

    def held(data, file):
        assert gate.wait(60)
        save(data, file)

    monkeypatch.setattr("torch.save", held)
    try:
        yield
    finally:
        gate.set()


class Training:
    """Everything that a run of a small network saves, with a step that changes all of it."""

    def __init__(self, optimizer="SGD", device="cpu"):
        torch.manual_seed(0)
        convolution = nn.Conv2d(3, 3, 3).to(memory_format=torch.channels_last)
        self.model = nn.Sequential(convolution, nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3))
        self.model[2].weight = convolution.weight  # tied
        self.model.register_buffer("view", torch.arange(12.0).reshape(3, 4)[:, 1:3])
        self.model.to(device)
        make = {
            "SGD": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
            "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.1),
        }
        self.optimizer = make[optimizer](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 3])
        self.average = ModelEmaV3(self.model, decay=0.9)
        self.nested = {"list": [1, {"tensor": torch.zeros((), device=device)}], "float": 0.5}

    def step(self):
        images = torch.randn(2, 3, 8, 8, device=next(self.model.parameters()).device)
        self.optimizer.zero_grad()
        self.model(images).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.average.update(self.model)
        self.model.view.add_(1)
        self.nested["list"][1]["tensor"].add_(1)
        self.nested["list"].append("more")
        self.nested["float"] += 1

    def state_dict(self):
        return {"nested": self.nested, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.nested = state["nested"]

    def checkpointer(self, folder, background):
        folder.mkdir(exist_ok=True)
        extras = {"trainer": self, "scheduler": self.scheduler, "ema": self.average}
        options = {"background": background, "model_optimizer": self.optimizer}
        return Checkpointer(self.model, str(folder), **options, **extras)


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_files_equal_those_written_at_once(tmp_path, monkeypatch, slow_copies, optimizer):
    """All values change before the first byte is written; buffers are reused and grow."""
    training = Training(optimizer)
    plain = training.checkpointer(tmp_path / "plain", background=False)
    background = training.checkpointer(tmp_path / "background", background=True)
    for i in range(3):
        name = f"model_{i:07d}"
        plain.save(name, unfinished={"loss": float(i)})
        with monkeypatch.context() as patch, held_writes(patch):
            background.save(name, unfinished={"loss": float(i)})
            training.step()
            assert not (tmp_path / "background" / f"{name}.pth").exists()
        background.wait()
        files = [tmp_path / folder / f"{name}.pth" for folder in ("plain", "background")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert (tmp_path / "background" / "last_checkpoint").read_text() == f"{name}.pth"
    saved = torch.load(files[1])
    assert saved["trainer"]["nested"]["list"][1]["tensor"] == 2
    assert not torch.equal(saved["model"]["0.weight"], training.model[0].weight)


@pytest.mark.parametrize("device", DEVICES)
def test_snapshot_is_of_the_moment(device):
    training = Training(device=device)
    training.step()
    large = torch.zeros(5_000_000, device=device)
    snapshot = HostCopy()
    for value in range(3):
        large.fill_(value)
        data = {
            "state": training.state_dict(),
            "large": large,
            "model": training.model.state_dict(),
        }
        expected = as_file(data)
        snapshot.take(data)
        training.step()
        large.fill_(-1)
        found = snapshot.read()
        assert found["large"].device.type == "cpu" and (found["large"] == value).all()
        if device == "cpu":
            assert as_file(found) == expected


def test_buffers_are_used_again():
    weights = {"a": torch.zeros(1000), "b": torch.zeros(2000)}
    snapshot = HostCopy()

    def places(data):
        snapshot.take(data)
        return [tensor.data_ptr() for tensor in snapshot.read().values()]

    first = places(weights)
    assert places(weights) == first
    longer = {**weights, "c": torch.zeros(10)}
    assert places(longer)[:2] == first and len(places(longer)) == 3
    other = {"a": torch.zeros(1000), "b": torch.zeros(3000)}
    assert [a == b for a, b in zip(places(other), first, strict=True)] == [True, False]


def test_unusual_tensors_are_copied_too():
    tensors = {
        "parameter": nn.Parameter(torch.ones(2)),
        "grows": torch.ones(3, requires_grad=True),
        "conjugate": torch.ones(2, dtype=torch.complex64).mul(1j).conj(),
        "sparse": torch.eye(3).to_sparse(),
        "empty": torch.ones(0, 3),
        "bfloat16": torch.ones(2, dtype=torch.bfloat16),
    }
    twice = {**tensors, "again": tensors["bfloat16"]}
    snapshot = HostCopy()
    snapshot.take(twice)
    expected = as_file(twice)
    with torch.no_grad():
        tensors["parameter"].zero_()
        tensors["bfloat16"].zero_()
    found = snapshot.read()
    assert isinstance(found["parameter"], nn.Parameter) and found["again"] is found["bfloat16"]
    assert found["grows"].requires_grad and found["conjugate"].is_conj()
    for name, value in torch.load(io.BytesIO(expected), weights_only=False).items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype
        assert torch.equal(found[name].to_dense(), value.to_dense())


def test_best_and_numbered_of_one_moment_are_copied_once(tmp_path, monkeypatch):
    training = Training()
    checkpointer = training.checkpointer(tmp_path, background=True)
    with held_writes(monkeypatch):
        checkpointer.save(BEST, iteration=4)
        training.step()
        checkpointer.save("model_0000004", iteration=4)  # does not wait for the first save
    checkpointer.wait()
    files = [tmp_path / f"{name}.pth" for name in (BEST, "model_0000004")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000004.pth"
    monkeypatch.undo()
    checkpointer.save("model_0000005", iteration=5)
    checkpointer.save("model_0000006", iteration=5, more=1)
    checkpointer.wait()
    nested = [torch.load(tmp_path / f"model_000000{i}.pth")["trainer"]["nested"] for i in (4, 5)]
    assert [each["float"] for each in nested] == [0.5, 1.5]
    assert torch.load(tmp_path / "model_0000006.pth")["more"] == 1


def test_only_the_newest_stay(tmp_path):
    model = nn.Linear(1, 1)
    checkpointer = Checkpointer(model, str(tmp_path), keep=2, background=True)
    for i in range(4):
        nn.init.constant_(model.weight, i)
        checkpointer.save(f"model_{i:07d}", iteration=i)
    file = checkpointer.get_checkpoint_file()  # waits, as all reads do
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last_checkpoint",
        "model_0000002.pth",
        "model_0000003.pth",
    ]
    nn.init.constant_(model.weight, 9)
    checkpointer.load(file)
    assert model.weight.item() == 3


# --- errors --------------------------------------------------------------------------------------


class FullDisk:
    """A torch.save whose first call fails, once ``ready`` is set, as on a full disk."""

    def __init__(self):
        self.save, self.calls, self.ready = torch.save, 0, threading.Event()
        self.ready.set()

    def __call__(self, data, file):
        self.calls += 1
        assert self.ready.wait(60)
        if self.calls == 1:
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        self.save(data, file)


@pytest.fixture
def full_disk(monkeypatch):
    """Replaces torch.save."""
    disk = FullDisk()
    monkeypatch.setattr("torch.save", disk)
    return disk


def check_for_a_minute(checkpointer):
    """Calls ``check``, which does not wait, until the write has failed."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        checkpointer.check()


@pytest.mark.parametrize("ask", ["wait", "check", "save", "load"])
def test_an_error_is_raised_once_by_whatever_comes_next(tmp_path, full_disk, ask):
    checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path), background=True)
    checkpointer.save("model_0000001", iteration=1)
    asks = {
        "wait": checkpointer.wait,
        "check": lambda: check_for_a_minute(checkpointer),
        "save": lambda: checkpointer.save("model_0000002", iteration=2),
        "load": lambda: checkpointer.load("model_0000001.pth"),
    }
    with pytest.raises(UserError, match=r"model_0000001\.pth cannot be written: .*unexpected pos"):
        asks[ask]()
    assert not list(tmp_path.iterdir())
    checkpointer.save("model_0000003", iteration=3)
    checkpointer.wait()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"


def test_nothing_is_written_after_an_error(tmp_path, full_disk):
    """Otherwise, a resume would know a best checkpoint that does not exist."""
    checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path), background=True)
    full_disk.ready.clear()
    checkpointer.save(BEST, iteration=1)
    checkpointer.save("model_0000001", iteration=1)
    full_disk.ready.set()
    with pytest.raises(UserError, match=r"model_best\.pth cannot be written"):
        checkpointer.wait()
    assert full_disk.calls == 1 and not list(tmp_path.iterdir())


class Loop(TrainerBase):
    """Detectron2's loop without a model, with our hooks; the weight is the last iteration."""

    def __init__(self, folder, values, fail_at=None):
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)
        self.values, self.fail_at = values, fail_at
        self.checkpointer = Checkpointer(self.model, str(folder), background=True, trainer=self)
        evaluate = lambda: {"bbox": {"AP": values[self.iter]}}  # noqa: E731
        evaluation = Evaluation(1, evaluate, lambda scalars: "bbox/AP")
        best = BestCheckpoint(self.checkpointer, evaluation)
        periodic = PeriodicCheckpoint(self.checkpointer, 2)
        self.register_hooks([evaluation, best, periodic])

    def run_step(self):
        if self.iter == self.fail_at:
            raise ValueError("a fault of the training's own")
        nn.init.constant_(self.model.weight, self.iter)

    def run(self):
        self.train(0, len(self.values))


def weights_in(folder):
    """Returns the iterations in each checkpoint's weight and trainer state."""
    found = {path.stem: torch.load(path) for path in folder.glob("*.pth")}
    return {
        name: (content["model"]["weight"].item(), content["trainer"]["iteration"])
        for name, content in found.items()
    }


def test_a_training_leaves_all_its_files(tmp_path):
    Loop(tmp_path, [1.0, 5.0, 2.0, 3.0, 4.0]).run()
    expected = {"model_best": 1, "model_0000001": 1, "model_0000003": 3, "model_final": 4}
    assert weights_in(tmp_path) == {name: (i, i) for name, i in expected.items()}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_training_ends_with_the_error_of_a_file(tmp_path, full_disk):
    with pytest.raises(UserError, match=r"model_best\.pth cannot be written"):
        Loop(tmp_path, [1.0]).run()  # after the last iteration, so that no call follows
    assert not list(tmp_path.iterdir())


def test_a_failed_training_leaves_whole_files(tmp_path, monkeypatch):
    loop, failed, saves = Loop(tmp_path, [1.0, 5.0, 2.0], fail_at=2), threading.Event(), []
    save, fail = torch.save, loop.after_train

    def late(data, file):
        saves.append(file)
        assert len(saves) == 1 or failed.wait(60)  # all saves but the first
        save(data, file)

    monkeypatch.setattr("torch.save", late)
    loop.after_train = lambda: (failed.set(), fail())
    with pytest.raises(ValueError, match="of the training's own"):
        loop.run()
    assert weights_in(tmp_path) == {"model_best": (1, 1), "model_0000001": (1, 1)}


def test_a_failed_training_tells_of_a_file_too(tmp_path, monkeypatch, full_disk, caplog):
    loop = Loop(tmp_path, [1.0], fail_at=0)
    loop.before_train = lambda: loop.checkpointer.save("model_0000000")
    with (
        caplog.at_level(logging.ERROR, logger="contnet.engine.hooks"),
        pytest.raises(ValueError, match="of the training's own"),
    ):
        loop.run()
    assert "model_0000000.pth cannot be written" in caplog.text


# --- real processes ------------------------------------------------------------------------------

# Imports once, and forks a process for each way to end while a checkpoint is partly written.
LEAVERS = """
import json, os, signal, sys, time, torch
from contnet.checkpoint.checkpointer import Checkpointer
from contnet.utils.files import WriteGuard

class Lease(WriteGuard):
    writer = "start"

    def __init__(self, how):
        self.how, self.begun = how, False

    def check(self):
        if self.how == "lease" and self.begun:
            raise SystemExit(3)

def train(folder, how):
    model = torch.nn.Linear(1000, 1000, bias=False)
    guard = Lease(how)
    checkpointer = Checkpointer(model, folder, background=True, guard=guard)
    torch.nn.init.constant_(model.weight, 1)
    checkpointer.save("model_0000001")
    checkpointer.wait()
    save = torch.save

    def slow(data, file):
        save(data, file)
        file.flush()
        open(folder + "/half", "w").close()
        guard.begun = True
        time.sleep(60 if how == "kill" else 0.5)

    torch.save = slow
    torch.nn.init.constant_(model.weight, 2)
    checkpointer.save("model_0000002")
    torch.nn.init.constant_(model.weight, 3)
    if how == "crash":
        raise SystemExit("a crash")
    if how == "lease":
        checkpointer.wait()

for folder in sys.argv[1:]:
    os.makedirs(folder)
    child = os.fork()
    if not child:
        train(folder, os.path.basename(folder))
        sys.exit()
    while not os.path.exists(folder + "/half"):
        time.sleep(0.01)
    if folder.endswith("kill"):
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# Exit status, and the last checkpoint.
ENDS = {"end": (0, 2), "crash": (1, 2), "lease": (3, 1), "kill": (-9, 1)}


@pytest.mark.slow
def test_processes_leave_a_whole_last_checkpoint(tmp_path):
    command = [sys.executable, "-c", LEAVERS, *(str(tmp_path / how) for how in ENDS)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert output.stdout.split() == [str(status) for status, _ in ENDS.values()], output.stderr
    for how, (_, last) in ENDS.items():
        folder = tmp_path / how
        name = (folder / "last_checkpoint").read_text()
        assert name == f"model_000000{last}.pth", how
        assert (torch.load(folder / name)["model"]["weight"] == last).all()
        assert len(list(folder.glob("model_0000002.pth.start.tmp"))) == (1 if how == "kill" else 0)
        assert len(list(folder.glob("*.pth"))) == last
