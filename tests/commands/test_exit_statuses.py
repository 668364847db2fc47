"""Tests the exit statuses that all commands share, by kind of error."""

import os
import signal
import subprocess
import sys
from functools import partial

import pytest
from conftest import REPOSITORY
from PIL import Image

from benchmarks import compare_checkouts, gpu_check
from benchmarks import main as benchmark
from contnet.commands import (
    analyze,
    configs,
    convert_dataset,
    convert_weights,
    demo,
    demo_imagenet,
    doctor,
    export,
    make_shards,
    model_zoo,
    predict,
    prepare_cityscapes,
    publish,
    report,
    results,
)
from contnet.launch import main as train_net
from contnet.slurm import submit

CONFIG = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
MAINS = {
    "analyze": analyze.main,
    "benchmark": benchmark.main,
    "compare_checkouts": partial(compare_checkouts.main, REPOSITORY),
    "configs": configs.main,
    "convert_dataset": convert_dataset.main,
    "convert_weights": convert_weights.main,
    "demo": demo.main,
    "demo_imagenet": demo_imagenet.main,
    "doctor": doctor.main,
    "export": export.main,
    "gpu_check": gpu_check.main,
    "make_shards": make_shards.main,
    "model_zoo": model_zoo.main,
    "predict": predict.main,
    "prepare_cityscapes": prepare_cityscapes.main,
    "publish": publish.main,
    "report": report.main,
    "results": results.main,
    "submit": submit.main,
    "train_net": train_net.main,
}
SCRIPTS = {path.stem for path in (REPOSITORY / "tools").glob("*.py")}


def status_of(name: str, *argv: str) -> int:
    """Returns the status of a command in this process."""
    try:
        return MAINS[name](list(argv))
    except SystemExit as ended:
        return ended.code


def test_all_commands_are_here():
    assert {*SCRIPTS, "train_net"} == set(MAINS)


@pytest.mark.parametrize("name", MAINS)
def test_a_wrong_option(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status_of(name, "--no-such-option") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("train_net", ["--config-file", CONFIG, "NO.SUCH", "1"]),
        ("train_net", ["--config-file", "gone.yaml"]),
        ("doctor", ["--config-file", CONFIG, "NO.SUCH", "1"]),
        ("doctor", ["--config-file", CONFIG, "--workers", "0"]),
        ("analyze", ["--config-file", CONFIG, "NO.SUCH", "1"]),
        ("analyze", ["--config-file", CONFIG, "--size", "800"]),
        ("configs", ["explain", "NO.SUCH"]),
        ("configs", ["show", CONFIG, "--changed", "NO.SUCH", "1"]),
        ("configs", ["diff", CONFIG, "gone.yaml"]),
        ("submit", ["--config-file", CONFIG, "--dry-run", "NO.SUCH", "1"]),
        ("submit", ["--config-file", CONFIG, "--cluster-file", "gone.yaml"]),
        ("make_shards", ["here", "there", "--workers", "0"]),
        ("prepare_cityscapes", ["--workers", "0"]),
        ("report", ["gone", "--score", "2"]),
        ("convert_weights", ["a.pth", "b.doc"]),
        ("convert_dataset", ["voc", ".", "b.doc"]),
        ("export", ["here", "there", "--format", "caffe"]),
    ],
)
def test_a_mistake_of_usage(name, argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status_of(name, *argv) == 2
    assert capsys.readouterr().err.count("error: ") == 1


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("train_net", ["--config-file", CONFIG, "MODEL.DEVICE", "cpu"]),
        ("doctor", ["--config-file", CONFIG, "--fix", "out.json"]),
        ("submit", ["--status", "gone"]),
        ("make_shards", ["gone", "there"]),
        ("prepare_cityscapes", ["--root", "gone"]),
        ("convert_weights", ["gone.pth", "b.pth"]),
        ("convert_dataset", ["voc", "gone", "b.json"]),
        ("report", ["gone"]),
        ("results", ["gone"]),
        ("analyze", ["--config-file", CONFIG, "--json", "gone/costs.json"]),
        ("configs", ["list", "no such word"]),
        ("gpu_check", ["--report"]),
        ("export", ["gone", "there", "--format", "onnx"]),
    ],
)
def test_what_is_missing(name, argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status_of(name, *argv) == 1
    assert capsys.readouterr().err.count("error: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "argv", "word"),
    [
        pytest.param(
            "demo",
            ["--output", "out", "SOLVER.MAX_ITER", "5000"],
            "iter: ",
            marks=pytest.mark.long,
        ),
        ("make_shards", ["images", "shards", "--workers", "1"], ""),
    ],
)
def test_ctrl_c(name, argv, word, tmp_path):
    """Interrupts a tool that trains, and one that reads many images."""
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    Image.effect_noise((1500, 1500), 50).save(folder / "0.jpg")
    for number in range(1, 2000):
        os.link(folder / "0.jpg", folder / f"{number}.jpg")
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if word in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
