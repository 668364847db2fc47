"""Subjects of tools/benchmark.py that start runs or write files, on next to nothing."""

import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from contnet.benchmark.main import main

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")


@pytest.mark.slow
def test_checkpoints(tmp_path, capsys):
    small = f"--rounds 1 --steps 1 --size 64 64 --folder {tmp_path} --config-file {LEAF}"
    assert main(["checkpoint", *small.split()]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^checkpoint of \d{3} MB; windows of 1 steps$", output, re.MULTILINE)
    for name in ("synchronous", "background"):
        assert re.search(rf"^{name} +lost in all +median +-?\d+\.\d ms", output, re.MULTILINE)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_scaling_over_two_processes():
    command = [sys.executable, str(REPOSITORY / "tools" / "benchmark.py"), "scaling"]
    small = "--model contnet_ti --size 32 32 --rounds 2"
    result = subprocess.run([*command, *small.split()], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for name in ("one process", "two, each alone", "two", "only the exchange"):
        assert re.search(rf"^{name} +median +\d+\.\d ms", result.stdout, re.MULTILINE)
    assert re.search(r"^efficiency of two processes: \d+ %$", result.stdout, re.MULTILINE)


def test_scaling_needs_two_gpus(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert main(["scaling", "--device", "cuda"]) == 1
    assert "has not two GPUs" in capsys.readouterr().err
