"""Tests that a run that resumes with another number of processes sees the same images."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SMALL, finish, metrics_of

SCRIPT = Path(__file__).with_name("seen.py")
OPTIONS = """
MODEL.META_ARCHITECTURE SeeingToy DATASETS.TEST () SOLVER.IMS_PER_BATCH 8 SOLVER.STEPS (5,)
SOLVER.CHECKPOINT_PERIOD 3 SOLVER.BASE_LR 0.1 LOG_PERIOD 1 INPUT.MIN_SIZE_TRAIN (32,64)
"""


def train(coco_root, folder, iterations, processes, passes=1, *more):
    """Trains the toy; returns the output."""
    process = subprocess.Popen(
        [
            *(sys.executable, str(SCRIPT), "--config-file", "configs/faster_rcnn_contti.yaml"),
            *("--num-gpus", str(processes), *SMALL, *OPTIONS.split(), "OUTPUT_DIR", str(folder)),
            *("SOLVER.MAX_ITER", str(iterations), "SOLVER.GRAD_ACCUM_STEPS", str(passes), *more),
        ],
        env={**os.environ, "DETECTRON2_DATASETS": str(coco_root), "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return finish(process)


def steps_of(folder, processes, passes=1):
    """Returns names and pixel sums of each step's images; deletes the files."""
    ranks = []
    for rank in range(processes):
        file = folder / f"seen{rank}.json"
        ranks.append(list(map(json.loads, file.read_text().splitlines())))
        file.unlink()
    # In the order in which a step is distributed.
    parts = [list(chain(*row)) for row in zip(*ranks, strict=True)]
    return [list(chain(*parts[i : i + passes])) for i in range(0, len(parts), passes)]


def weights_of(folder):
    return torch.load(folder / "model_final.pth")["model"]


@pytest.fixture(scope="module")
def undisturbed(coco_root, tmp_path_factory):
    """Returns the folder and the steps of a run in two processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(coco_root, folder, 6, 2)
    return folder, steps_of(folder, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "passes", "workers"),
    [pytest.param(1, 1, 0, marks=pytest.mark.long), (1, 2, 1)],
    ids=["one", "one, two passes, a worker"],
)
def test_another_number_of_processes(coco_root, undisturbed, tmp_path, processes, passes, workers):
    whole, expected = undisturbed
    assert len(expected) == 6 and len({json.dumps(step) for step in expected}) == 6
    train(coco_root, tmp_path, 3, 2)
    assert steps_of(tmp_path, 2) == expected[:3]
    more = ("DATALOADER.NUM_WORKERS", str(workers), "--resume")
    output = train(coco_root, tmp_path, 6, processes, passes, *more)
    assert steps_of(tmp_path, processes, passes) == expected[3:]
    assert "their order is not that" not in output
    assert [line["images_seen"] for line in metrics_of(tmp_path)] == [8, 16, 24, 32, 40, 48]
    for name, value in weights_of(whole).items():
        torch.testing.assert_close(weights_of(tmp_path)[name], value, rtol=1e-5, atol=1e-6)
