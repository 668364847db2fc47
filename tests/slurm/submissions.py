"""A simulated SLURM, a machine without SLURM, and submissions with tools/submit.py."""

import os
import shutil
import stat
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL
from detectron2.data import MetadataCatalog

from contnet.slurm.submit import main

ANNOTATIONS = "coco/annotations/instances_train2017.json"
LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")

# %P|%a|%G|%c|%m|%l|%N|%n
NODES = """\
gpu*|up|gpu:a100:8(S:0-1)|64|512000|2-00:00:00|node1|node1
gpu*|up|gpu:a100:8(S:0-1)|64|512000|2-00:00:00|node2|node2
old|up|gpu:1080ti:4|16|64000|12:00:00|node3|node3
cpu|up|(null)|32|128000|infinite|node4|node4
closed|drain|gpu:8|32|128000|infinite|node5|node5
"""
FAKES = {
    "sbatch": 'cp "$1" sent.sh && echo "$1" > script && echo "Submitted batch job 4242"',
    "srun": "exit 1",
    "sinfo": "cat nodes",
    "squeue": 'case "$*" in *%o*) exec cat script;; esac; if [ -s jobs ]; then cat jobs; else '
    'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi',
    "scancel": "echo scancel",
}


class FakeSlurm:
    """Replaces SLURM's clients by scripts that record their arguments and answer from files."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "nodes").write_text(NODES)
        for name, answer in FAKES.items():
            self.set(name, answer)

    def set(self, name: str, answer: str) -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\ncd {self.folder}\necho "{name} $*" >> calls\n{answer}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def sent(self) -> list[str]:
        """Returns the lines that sbatch got."""
        return (self.folder / "sent.sh").read_text().splitlines()

    def show_jobs(self, text: str) -> None:
        (self.folder / "jobs").write_text(text)


@pytest.fixture
def here(coco_root, tmp_path, monkeypatch):
    """Changes to a folder in which this process's Detectron2 finds the tiny COCO."""
    work = tmp_path / "work"
    root = work / MetadataCatalog.get("coco_2017_train").json_file.removesuffix(ANNOTATIONS)
    root.mkdir(parents=True, exist_ok=True)
    (root / "coco").symlink_to(coco_root / "coco")
    monkeypatch.chdir(work)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return work


@pytest.fixture
def no_slurm(here, tmp_path, monkeypatch):
    """Simulates a machine without SLURM."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "git", "uname"):
        (programs / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return here


@pytest.fixture
def slurm(here, tmp_path, monkeypatch):
    folder = tmp_path / "fake"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return FakeSlurm(folder)


GPU = [*SMALL, "MODEL.DEVICE", "cuda"]
JOB = ["--timeout-hours", "24", "--assume-shared"]


def submit(*options: str) -> int:
    return main(["--config-file", LEAF, *JOB, *options])


def error_of(capsys, *argv: str) -> str:
    """Runs main with a mistake in ``argv`` or in its files; returns the error line."""
    assert main(list(argv)) in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]
