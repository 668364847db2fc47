"""Tests that checkpoints are saved completely or not at all, and that old ones are deleted."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.utils.errors import UserError


def assert_intact(folder, value):
    """Checks that the last checkpoint is complete and has this value."""
    name = (folder / "last_checkpoint").read_text()
    assert torch.load(folder / name)["model"]["weight"].flatten()[0] == value
    for path in folder.glob("*.pth"):
        torch.load(path)


@pytest.mark.parametrize("name", ["model_0000002", "model_0000001"], ids=["new", "same name"])
def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch, name):
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, 1)
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")

    def save_half(data, file):
        whole = tmp_path / "elsewhere"
        save(data, whole)
        file.write(whole.read_bytes()[:500])
        whole.unlink()
        raise KeyboardInterrupt

    save = torch.save
    monkeypatch.setattr("torch.save", save_half)
    torch.nn.init.constant_(model.weight, 2)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save(name)
    assert_intact(tmp_path, 1)
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr("torch.save", save)
    checkpointer.save(name)
    assert_intact(tmp_path, 2)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def save(data, file):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    checkpointer = Checkpointer(torch.nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("model_0000001")
    monkeypatch.setattr("torch.save", save)
    with pytest.raises(UserError, match=r"model_0000002\.pth cannot be written"):
        checkpointer.save("model_0000002")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


SAVER = """
import sys, torch
from contnet.checkpoint.checkpointer import Checkpointer
model = torch.nn.Linear(6000, 6000, bias=False)
checkpointer = Checkpointer(model, sys.argv[1], keep=2, background=sys.argv[2] == "True")
for i in range(1000):
    torch.nn.init.constant_(model.weight, i)
    checkpointer.save(f"model_{i:07d}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_sigkill_while_saving_leaves_the_last_checkpoint(tmp_path, background):
    """A child repeatedly writes 144 MB, and is killed while a second or later file is open."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(SAVER), str(tmp_path), str(background)]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not any(p.stat().st_size > 1_000_000 for p in tmp_path.glob("model_0000001.pth*")):
            assert child.poll() is None, child.stderr.read()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert_intact(tmp_path, int((tmp_path / "last_checkpoint").read_text()[6:13]))
    checkpointer = Checkpointer(torch.nn.Linear(1, 1), str(tmp_path))
    checkpointer.remove_leftovers()
    assert not list(tmp_path.glob("*.tmp"))


def test_leftovers_of_evaluations_that_may_still_run_stay(tmp_path):
    for name in ("model_0000001.pth.tmp", "results.json.lease1.tmp", "results.json.tmp"):
        (tmp_path / name).touch()
    Checkpointer(torch.nn.Linear(1, 1), str(tmp_path)).remove_leftovers()
    assert [path.name for path in tmp_path.iterdir()] == ["results.json.tmp"]


def test_only_the_newest_checkpoints_stay(tmp_path):
    checkpointer = Checkpointer(torch.nn.Linear(1, 1), str(tmp_path), keep=2)
    (tmp_path / "model_best.pth").write_text("mine")
    for i in range(4):
        checkpointer.save(f"model_{i:07d}")
    checkpointer.save("model_final")
    names = sorted(p.name for p in tmp_path.glob("*.pth"))
    assert names == [
        "model_0000002.pth",
        "model_0000003.pth",
        "model_best.pth",
        "model_final.pth",
    ]


def test_files_of_a_later_time_do_not_push_out_the_last_checkpoint(tmp_path):
    """This happens in a folder that was copied from a machine whose clock is ahead."""
    checkpointer = Checkpointer(torch.nn.Linear(1, 1), str(tmp_path), keep=2)
    later = time.time() + 3600
    for i in range(2):
        checkpointer.save(f"model_{i:07d}")
        os.utime(tmp_path / f"model_{i:07d}.pth", (later + i, later + i))
    checkpointer.save("model_0000002")
    names = sorted(p.name for p in tmp_path.glob("*.pth"))
    assert names == ["model_0000001.pth", "model_0000002.pth"]
    checkpointer.save("model_best")
    assert sorted(p.name for p in tmp_path.glob("model_0*.pth")) == names
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
