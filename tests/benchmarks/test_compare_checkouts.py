"""Tests the comparison of two checkouts with equal and different results."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from benchmarks.compare_checkouts import compare_runs, main


def write_run(folder: Path, prefix: str = "") -> Path:
    """Writes the folder of a run of two iterations; module names start with ``prefix``."""
    folder.mkdir()
    lines = [
        {"iteration": i, "total_loss": 1.5 - i, "time": torch.rand(()).item()} for i in range(2)
    ]
    write_metrics(folder, lines)
    record = {"dataset": "drawn", "metrics": {"bbox": {"AP": 12.5, "APl": float("nan")}}}
    (folder / "results.json").write_text(json.dumps([record]))
    model = {f"{prefix}{name}": torch.full((2, 3), float(i)) for i, name in enumerate("ab")}
    state = {i: {"momentum_buffer": torch.ones(3)} for i in range(2)}
    optimizer = {"state": state, "param_groups": [{"params": [0, 1], "lr": 0.1}]}
    content = {"model": model, "trainer": {"iteration": 1, "optimizer": optimizer}}
    torch.save(content, folder / "model_final.pth")
    return folder


def write_metrics(folder: Path, lines: list[dict]) -> None:
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """Writes two equal runs, whose modules have different names."""
    return write_run(tmp_path / "before"), write_run(tmp_path / "after", "renamed.")


def test_names_times_and_memory_do_not_count(runs):
    lines = read_metrics(runs[1])
    lines[1]["host_memory_mb"] = 100.0
    write_metrics(runs[1], lines)
    assert compare_runs(*runs) == []


def test_first_loss_that_differs(runs):
    lines = read_metrics(runs[1])
    lines[1]["total_loss"] += 1e-15
    write_metrics(runs[1], lines)
    (difference,) = compare_runs(*runs)
    assert all(part in difference for part in ("iteration 1, total_loss", "0.5 before", "0.500000"))


def test_a_metric_that_only_one_has(runs):
    lines = read_metrics(runs[1])
    for line in lines:
        line["loss_rpn"] = 2.0
    write_metrics(runs[1], lines)
    (difference,) = compare_runs(*runs)
    assert "only after has loss_rpn" in difference


def test_a_lost_line(runs):
    write_metrics(runs[1], read_metrics(runs[1])[:1])
    (difference,) = compare_runs(*runs)
    assert "iteration 1: only before has it" in difference


def test_an_evaluation_that_differs(runs):
    (record,) = json.loads((runs[1] / "results.json").read_text())
    record["metrics"]["bbox"]["AP"] = 12.75
    (runs[1] / "results.json").write_text(json.dumps([record]))
    (difference,) = compare_runs(*runs)
    assert "bbox/AP: 12.5 before, 12.75 after" in difference


def test_detections_that_differ(runs):
    for score, folder in zip((0.5, 0.25), runs, strict=True):
        (folder / "inference").mkdir()
        (folder / "inference" / "detections.json").write_text(json.dumps([{"score": score}]))
    (difference,) = compare_runs(*runs)
    assert "inference/detections.json" in difference


def change_last_bit(content):
    value = content["model"]["renamed.b"]
    value[1, 2] = torch.nextafter(value[1, 2], torch.tensor(2.0))


def transpose(content):
    content["model"]["renamed.b"] = content["model"]["renamed.b"].t()


def change_order(content):
    content["model"] = dict(reversed(content["model"].items()))


def change_momentum(content):
    content["trainer"]["optimizer"]["state"][1]["momentum_buffer"] *= 2


def add_ema(content):
    content["ema"] = {"c": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_last_bit, "weights: tensor 1 of 2, of shape (2, 3)"),
        (transpose, "weights: tensor 1 of 2, of shape (2, 3), (3, 2) after"),
        (change_order, "weights: tensor 0 of 2, of shape (2, 3)"),
        (change_momentum, "optimiser's state: tensor 1 of 2, of shape (3,)"),
        (add_ema, "EMA weights: 0 tensors before, 1 after"),
    ],
)
def test_first_tensor_that_differs(runs, change, told):
    content = torch.load(runs[1] / "model_final.pth")
    change(content)
    torch.save(content, runs[1] / "model_final.pth")
    assert compare_runs(*runs) == [f"before: {told}"]


# ---- whole checkouts


@pytest.fixture
def copy(tmp_path) -> Path:
    """Copies the files that a training needs."""
    target = tmp_path / "copy"
    for part in ("projects", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / part, target / part, ignore=ignored)
    shutil.copy(REPOSITORY / "train_net.py", target)
    return target


@pytest.mark.long
def test_a_changed_network_is_found(copy, capsys):
    argv = [str(copy), "--only", "classifier"]
    assert main(REPOSITORY, argv) == 0
    assert capsys.readouterr().out.startswith("classifier: equal bit for bit")

    file = copy / "projects" / "ConTNet" / "contnet" / "modeling" / "encoder.py"
    text = file.read_text()
    changed = text.replace("= LayerNorm(dim)", "= LayerNorm(dim, eps=1e-4)")
    assert changed != text
    file.write_text(changed)
    assert main(REPOSITORY, argv) == 1
    output = capsys.readouterr().out
    assert output.startswith("classifier: DIFFERENT")
    assert "iteration 0, total_loss: " in output and "weights: tensor 0 of " in output


def test_a_failed_training_is_told(copy, capsys):
    (copy / "train_net.py").write_text("raise SystemExit('the disk is full')")
    assert main(REPOSITORY, [str(copy), "--only", "fcos"]) == 1
    output = capsys.readouterr().out
    assert output.startswith("fcos: FAILED") and "the disk is full" in output


@pytest.mark.parametrize("argv", [[], ["nowhere"], [str(REPOSITORY), "--only", "retinanet"]])
def test_mistakes_of_the_command_line(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(REPOSITORY, argv)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err
