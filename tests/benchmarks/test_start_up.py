"""Tests the start-up benchmark: counted parses and drawn scenes."""

import re

import pytest
from cityscapes import use_cityscapes

from benchmarks.main import main as benchmarks


@pytest.mark.long
def test_benchmark_counts_parses(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = "--images 120 --objects 900 --processes 1 --detectron2 --scenes 0"
    assert benchmarks(["start-up", *options.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    parses = [int(line.split(" parses")[0].split()[-1]) for line in lines if " parses" in line]
    assert parses == [1, 0]


def test_benchmark_draws_scenes(capsys, cityscapes_root):
    try:
        assert benchmarks(["start-up", "--images", "0", "--scenes", "4"]) == 0
    finally:
        use_cityscapes(cityscapes_root)
    first, second = re.findall("4 scenes, (first|second) start", capsys.readouterr().out)
    assert (first, second) == ("first", "second")
