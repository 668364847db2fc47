"""The check on a GPU, as far as a CPU shows it: what it writes, and how it fails."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY


def check(*options, python=sys.executable):
    command = ["sh", str(REPOSITORY / "tools" / "gpu_check.sh"), "--device", "cpu", *options]
    environment = {**os.environ, "PYTHON": python}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_a_part_leaves_a_line_and_a_log(tmp_path):
    done = check("--only", "versions", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert (result["part"], result["status"]) == ("versions", "ok")
    assert result["figures"]["torch"] == torch.__version__
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.jsonl", "versions.log"]


def test_parts_after_one_that_failed_have_their_turn(tmp_path):
    options = ("--only", "network", "--only", "versions", "--output", str(tmp_path))
    assert check(*options, python="false").returncode == 1
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["part"], line["status"], line["figures"]) for line in lines] == [
        ("versions", "failed", {}),
        ("network", "failed", {}),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "versoins"], "error: no part versoins"),
        (["--part", "versions"], "error: unknown option --part"),
        (["--only"], "error: --only needs a value"),
    ],
)
def test_mistakes_are_one_line(options, message, tmp_path):
    done = check("--output", str(tmp_path / "out"), *options)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(message)
    assert not (tmp_path / "out").exists()
