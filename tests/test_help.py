"""Tests ``--help`` of every script, which must not leave files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from benchmarks import main as benchmarks
from contnet.commands import convert_dataset

SCRIPTS = [*sorted((REPOSITORY / "tools").glob("*.py")), REPOSITORY / "train_net.py"]


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_writes_nothing(script, tmp_path):
    places = {name: tmp_path / name for name in ("home", "here", "temporary")}
    for place in places.values():
        place.mkdir()
    files = [path for path in REPOSITORY.glob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    done = subprocess.run(
        [sys.executable, str(script), "--help"],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(places["home"]),
            "TMPDIR": str(places["temporary"]),
        },
        cwd=places["here"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert left(places["home"]) == left(places["here"]) == []
    # Importing torchvision makes this empty folder.
    made = left(places["temporary"])
    assert all(name.startswith("torchinductor_") and "/" not in name for name in made)
    assert {path: path.stat().st_mtime_ns for path in files} == before


@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_help_of_the_converters_forms(form, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        convert_dataset.main([form, "--help"])
    assert ended.value.code == 0 and "--split" in capsys.readouterr().out
    assert left(tmp_path) == []


@pytest.mark.parametrize("subject", benchmarks.SUBJECTS)
def test_help_of_the_benchmarks_subjects(subject, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        benchmarks.main([subject, "--help"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("usage: ")
    assert left(tmp_path) == []
