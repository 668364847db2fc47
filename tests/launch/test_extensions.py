"""Tests the docs' example: a user's backbone, top block, data set and metric in a training run."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, SMALL, finish
from PIL import Image, ImageDraw

PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()


def _draw_squares(folder, number):
    folder.mkdir(parents=True)
    lines = []
    for i in range(number):
        box = (8 + 8 * i, 8, 32 + 8 * i, 32)
        image = Image.new("RGB", (96, 64))
        ImageDraw.Draw(image).rectangle(box, fill="white")
        image.save(folder / f"{i}.png")
        lines.append(",".join(map(str, [f"{i}.png", 96, 64, *box])))
    (folder / "boxes.csv").write_text("\n".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_example_of_the_docs_trains(tmp_path, processes):
    toy, script = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (command,) = re.findall(r"```bash\n(python train_toy.py .*?)```", PAGE, re.DOTALL)
    (tmp_path / "toy.py").write_text(toy)
    (tmp_path / "train_toy.py").write_text(script)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    _draw_squares(tmp_path / "squares" / "train", 4)
    _draw_squares(tmp_path / "squares" / "val", 3)
    words = shlex.split(command.replace("\\\n", " "))[1:]
    process = subprocess.Popen(
        [sys.executable, *words, *SMALL, "--num-gpus", str(processes)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    finish(process)
    output = tmp_path / "output" / "toy"
    (result,) = json.loads((output / "results.json").read_text())
    assert (result["dataset"], result["iteration"]) == ("squares_val", 1)
    # A third of 100 for each image of the set, from either process.
    thirds = 3 * result["metrics"]["squares"]["hits"] / 100
    assert thirds == pytest.approx(round(thirds)) and 0 <= round(thirds) <= 3
    best = torch.load(output / "model_best.pth")
    assert "backbone.bottom_up.res2.weight" in best["model"]
    assert best["contnet"]["classes"] == ["square"]
    (metrics,) = [
        json.loads(line)
        for line in (output / "metrics.json").read_text().splitlines()
        if "squares/hits" in line
    ]
    assert metrics["images_seen"] == 4
