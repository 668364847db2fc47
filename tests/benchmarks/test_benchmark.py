"""Tests that each benchmark runs and prints its results; times are never checked."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

from benchmarks import pixels
from benchmarks.limits import count_parts, least_seconds
from benchmarks.main import main
from benchmarks.timing import alternate, print_ratios
from contnet.modeling.contnet import create_model

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")


def test_ways_take_turns():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = alternate(ways, rounds=3, warmup=2)
    assert "".join(calls) == "ab" * 5
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_of_the_same_round(capsys):
    ratios = print_ratios({"slow": [2.0, 40.0, 6.0], "fast": [1.0, 10.0, 2.0]}, "slow")
    assert ratios == {"slow": 1.0, "fast": 3.0}
    assert re.search(
        r"fast +median +2000\.0 ms +\(1000\.0 to 10000\.0\) +3\.00 x slow", capsys.readouterr().out
    )


def test_network_beside_plain(capsys):
    argv = ["network", "--variant", "contnet_ti", "--size", "64", "96", "--rounds", "1"]
    assert main([*argv, "--precision", "bf16", "--optimized", "--device", "cpu"]) == 0
    assert main([*argv, "--backward", "--device", "cpu"]) == 0
    assert main([*argv, "--backward", "--checkpointing", "block", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    kept = re.findall(r"^contnet: (\d+) MiB kept for the backward pass$", out, re.M)
    assert 0 < 2 * int(kept[1]) < int(kept[0])
    assert len(re.findall(r"^contnet +median .* x plain$", out, re.M)) == 3
    assert len(re.findall(r"^optimized +median .* x plain$", out, re.M)) == 1


def test_an_optimised_network_has_no_backward_pass(capsys):
    assert main(["network", "--backward", "--optimized"]) == 1
    assert "--optimized is only for inference" in capsys.readouterr().err


@pytest.mark.slow
def test_network_beside_others(capsys):
    argv = ["--variant", "contnet_ti", "--size", "64", "96", "--rounds", "1", "--device", "cpu"]
    assert main(["network", *argv, "--others"]) == 0
    out = capsys.readouterr().out
    for name in ("Detectron2 R-50 FPN", "timm ResNet-50", "timm Swin-T", "timm DeiT-S"):
        assert re.search(rf"^{name} +median .* x plain$", out, re.M)


def test_parts_add_up_to_the_published_count():
    parts = count_parts(create_model("contnet_m"), (1, 3, 224, 224))
    attention = sum(done for name, (done, _) in parts.items() if name.endswith("attention"))
    assert attention / 1e9 == pytest.approx(0.354, abs=5e-4)
    assert sum(done for done, _ in parts.values()) / 1e9 == pytest.approx(3.086 + 0.354, rel=1e-3)
    # The stem reads an image and writes 64 maps of half the side.
    assert parts["stem convolution"][1] == 3 * 224**2 + 64 * 112**2 + 64 * 3 * 49


def test_a_part_computes_or_moves():
    parts = {"computes": (1000, 1), "moves": (1, 1000)}
    least = least_seconds(parts, (100.0, 400.0), torch.float32)
    assert least == {"computes": 10.0, "moves": 10.0}


@pytest.mark.long
def test_growth_with_pixels(capsys, monkeypatch):
    monkeypatch.setattr(pixels, "SIZES", ((64, 64), (448, 448)))
    argv = ["pixels", "--variant", "contnet_ti", "--rounds", "1", "--device", "cpu"]
    assert main(argv) == 0
    assert re.search(
        r"^time grows with the power -?\d\.\d{3} of the pixels$", capsys.readouterr().out, re.M
    )


@pytest.mark.slow
def test_steps_of_two_configs(capsys):
    argv = ["step", "--size", "64", "96", "--rounds", "1", "--unfrozen"]
    argv += ["--configs", LEAF.replace("contti", "r50"), LEAF]
    assert main([*argv, "--", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"]) == 0
    assert re.search(r"contti.yaml +median", capsys.readouterr().out)


@pytest.mark.slow
def test_checkpoints(tmp_path, capsys):
    small = f"--rounds 1 --steps 1 --size 64 64 --folder {tmp_path} --config-file {LEAF}"
    assert main(["checkpoint", *small.split()]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^checkpoint of \d{3} MB; windows of 1 steps$", output, re.MULTILINE)
    for name in ("synchronous", "background"):
        assert re.search(rf"^{name} +lost in all +median +-?\d+\.\d ms", output, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_loading_of_a_classifier(capsys):
    argv = ["loading", "--classifier", "--number", "4", "--rounds", "1"]
    assert main([*argv, "--batch", "4", "--batches", "2", "--workers", "1"]) == 0
    output = capsys.readouterr().out
    for name in ("list", "one tensor"):
        rates = rf"^{name}: \d+\.\d images/s, \d+\.\d\d ms of the main thread per batch$"
        assert re.search(rates, output, re.MULTILINE)


@pytest.mark.long
def test_scaling_over_two_processes():
    command = [sys.executable, str(REPOSITORY / "tools" / "benchmark.py"), "scaling"]
    small = "--model contnet_ti --size 64 64 --rounds 1"
    result = subprocess.run([*command, *small.split()], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    for name in ("one process", "two, each alone", "two", "only the exchange"):
        assert re.search(rf"^{name} +median +\d+\.\d ms", result.stdout, re.MULTILINE)
    assert re.search(r"^efficiency of two processes: \d+ %$", result.stdout, re.MULTILINE)


def test_scaling_needs_two_gpus(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert main(["scaling", "--device", "cuda"]) == 1
    assert "does not have two GPUs" in capsys.readouterr().err
