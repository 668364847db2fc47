"""Tests tools/results.py on made-up runs, and on networks trained by tools/submit.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import REPOSITORY
from damages import DAMAGES, damage

from contnet.commands.results import main
from contnet.config import load_config
from contnet.evaluation.results import record_results

SUBMIT = str(REPOSITORY / "tools" / "submit.py")
BASE = str(REPOSITORY / "configs" / "imagenet" / "Base-plain.yaml")
RECIPE_OPTIONS = """
MODEL.DEVICE cpu MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 56 SOLVER.IMS_PER_BATCH 4
INPUT.CLASSIFIER.RESIZE_TEST 64 INPUT.CLASSIFIER.CROP_TEST 56 SOLVER.MAX_ITER 4 LOG_PERIOD 1
SOLVER.WARMUP_ITERS 1 DATALOADER.NUM_WORKERS 0
"""
RECIPE = RECIPE_OPTIONS.split()


def rows_of(capsys, *options: str) -> list[dict]:
    """Returns the rows that ``--json`` prints."""
    capsys.readouterr()
    assert main([*options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def table_of(capsys, *options: str) -> list[dict[str, str]]:
    """Returns the rows of the table, by column name."""
    capsys.readouterr()
    assert main([*options]) == 0
    lines = capsys.readouterr().out.splitlines()
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def make_run(folder: Path, top1: float | None, *options: str, metrics: list[dict] = ()) -> Path:
    """Makes a folder like that of a training run."""
    folder.mkdir(parents=True)
    opts = [*RECIPE, "MODEL.CLASSIFIER.NAME", "resnet18", *options, "OUTPUT_DIR", str(folder)]
    (folder / "config.yaml").write_text(load_config(BASE, opts).dump())
    if top1 is not None:
        scores = {"imagenet_val": {"classification": {"top1": top1, "top5": 90.0}}}
        record_results(str(folder), scores, iteration=3, weights=None, ema=False)
        (folder / "model_final.pth").touch()
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


# --- real runs -----------------------------------------------------------------------------------


@pytest.mark.long
def test_networks_are_trained_alike_and_kept(imagenet_root, tmp_path, capsys):
    environment = {"DETECTRON2_DATASETS": str(imagenet_root), "OMP_NUM_THREADS": "1"}
    out = str(tmp_path / "out")
    name = "MODEL.CLASSIFIER.NAME"
    only = ["--only", f"{name}=resnet18", "SOLVER.BASE_LR 0.05 MODEL.CLASSIFIER.DROP_PATH_RATE 0.1"]

    def run(networks: str, seeds: str, *options: str, status: int = 0) -> str:
        """Submits to this machine; returns the output."""
        sweeps = ["--sweep", f"{name}={networks}", "--sweep", f"SEED={seeds}"]
        local = ["--cluster", "local", "--no-snapshot", "--config-file", BASE]
        done = subprocess.run(
            [sys.executable, SUBMIT, *local, *sweeps, *RECIPE, "OUTPUT_DIR", out, *options],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stderr if status else done.stdout

    def times() -> dict[str, int]:
        files = Path(out).glob("*/model_final.pth")
        return {path.parent.name: path.stat().st_mtime_ns for path in files}

    run("contnet_ti,resnet18", "1", *only)
    ours, theirs = "NAME=contnet_ti,SEED=1", "NAME=resnet18,SEED=1,BASE_LR=0.05,DROP_PATH_RATE=0.1"
    trained = times()
    assert set(trained) == {ours, theirs}
    error = run("contnet_ti,resnet18", "1", *only, status=1)
    assert "add --resume" in error and error.count("\n") == 1

    # Another seed uses the same folder; finished runs are kept and not started again.
    printed = run("contnet_ti,resnet18", "1,2", *only, "--resume")
    assert f"{ours}: finished, kept" in printed and f"{ours}: started" not in printed
    all_times = times()
    assert len(all_times) == 4 and trained.items() <= all_times.items()
    assert "started" not in run("contnet_ti,resnet18", "1,2", *only, "--resume")
    assert times() == all_times

    rows = rows_of(capsys, out, "--cost")
    assert [row["run"] for row in rows] == [ours, theirs, *sorted(set(all_times) - set(trained))]
    configs = []
    for row in rows:
        folder = Path(row["folder"])
        (result,) = json.loads((folder / "results.json").read_text())
        assert row["metrics"]["classification/top1"] == result["metrics"]["classification"]["top1"]
        assert row["state"] == "finished" and row["iteration"] == 4
        network = timm.create_model(row["run"].split(",")[0][5:], num_classes=7)
        parameters = sum(p.numel() for p in network.parameters()) / 1e6
        assert row["parameters_m"] == pytest.approx(parameters)
        assert 100 < row["memory_mb"] < 20000 and row["images_per_second"] > 0
        lines = (folder / "config.yaml").read_text().splitlines()
        own = ("    NAME:", "SEED:", "OUTPUT_DIR:", "  BASE_LR:", "    DROP_PATH_RATE:")
        configs.append([line for line in lines if not line.startswith(own)])
        alone = "resnet18" in row["run"]
        assert ("  BASE_LR: 0.05" in lines) == ("    DROP_PATH_RATE: 0.1" in lines) == alone
    assert all(config == configs[0] for config in configs)

    # Different seeds start from different weights.
    stems = [
        torch.load(Path(out, f"NAME=contnet_ti,SEED={seed}", "model_final.pth"))["model"]
        for seed in (1, 2)
    ]
    assert not torch.equal(*(stem["network.stem.weight"] for stem in stems))

    grouped = {row["run"]: row for row in rows_of(capsys, out, "--cost", "--group-by-seed")}
    assert set(grouped) == {"NAME=contnet_ti", "NAME=resnet18,BASE_LR=0.05,DROP_PATH_RATE=0.1"}
    row = grouped["NAME=contnet_ti"]
    assert row["seeds"] == [1, 2] and row["runs"][0]["run"] == ours
    tops = [each["metrics"]["classification/top1"] for each in row["runs"]]
    assert row["metrics"]["classification/top1"] == pytest.approx(sum(tops) / 2)

    # For more iterations, the run is trained again.
    run("contnet_ti", "1", "--resume", "SOLVER.MAX_ITER", "5")
    assert rows_of(capsys, out)[0]["iteration"] == 5
    assert {key for key, value in times().items() if value != all_times[key]} == {ours}


# --- made-up runs --------------------------------------------------------------------------------


def test_cost(tmp_path, capsys):
    lines = [{"iteration": i, "total_loss": 1.0, "time": t} for i, t in enumerate((9.0, 0.1, 0.2))]
    cpu = [{**line, "host_memory_mb": 100.0 + i} for i, line in enumerate(lines)]
    gpu = [{**line, "gpu_memory_mb": 300.0} for line in lines]
    make_run(tmp_path / "a", 50.0, metrics=cpu)
    make_run(tmp_path / "b", 50.0, "MODEL.CLASSIFIER.NAME", "contnet_s", metrics=gpu)
    make_run(tmp_path / "c", 50.0)
    with open(tmp_path / "a" / "metrics.json", "a") as file:
        file.write('{"iteration": 3, "ti')
    a, b, c = table_of(capsys, str(tmp_path), "--cost")
    macs = "MACs G, without / with attention"
    assert (a["images/s in training"], a["memory MB"]) == ("20.0", "102")
    assert a[macs] == c[macs] and a[macs].split(" / ")[0] == a[macs].split(" / ")[1]
    assert float(b[macs].split(" / ")[0]) < float(b[macs].split(" / ")[1])
    assert (b["memory MB"], c["memory MB"], c["images/s in training"]) == (
        "300",
        "not measured",
        "not measured",
    )
    assert "memory MB" not in table_of(capsys, str(tmp_path))[0]


def test_detectors_have_no_macs(tmp_path, capsys):
    leaf = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
    (tmp_path / "config.yaml").write_text(load_config(leaf, ["MODEL.DEVICE", "cpu"]).dump())
    (row,) = rows_of(capsys, str(tmp_path), "--cost")
    assert 10 < row["parameters_m"] < 60 and "macs_g" not in row
    assert "parameters M" in table_of(capsys, str(tmp_path), "--cost")[0]


def test_seeds_are_one_row(tmp_path, capsys):
    make_run(tmp_path / "NAME=x,SEED=1", 50.0, "SEED", "1")
    make_run(tmp_path / "NAME=x,SEED=2", 60.0, "SEED", "2")
    make_run(tmp_path / "NAME=x,SEED=3", None, "SEED", "3")
    make_run(tmp_path / "NAME=y,SEED=1", 70.0, "SEED", "1", "SOLVER.BASE_LR", "0.2")
    (tmp_path / "NAME=z,SEED=1" / "slurm").mkdir(parents=True)
    (tmp_path / "NAME=z,SEED=1" / "slurm" / "submission.json").write_text("[]")
    x, y, z = table_of(capsys, str(tmp_path), "--group-by-seed")
    assert (x["run"], x["seeds"]) == ("NAME=x", "1, 2, 3")
    assert x["classification/top1"] == "55.00 (50.00, 60.00, -)"
    assert x["state"] == "finished; not finished" and x["iteration"] == "4, 0"
    assert (y["run"], y["seeds"], y["classification/top1"]) == ("NAME=y", "1", "70.00")
    assert (z["run"], z["seeds"], z["state"]) == ("NAME=z", "-", "never started")

    rows = rows_of(capsys, str(tmp_path), "--group-by-seed", "--metric", "classification/top1")
    assert [row["metrics"] for row in rows] == [
        {"classification/top1": 55.0},
        {"classification/top1": 70.0},
        {},
    ]
    assert [each["seed"] for each in rows[0]["runs"]] == [1, 2, 3]


def test_seeds_with_other_settings_are_not_mixed(tmp_path, capsys):
    """The names do not show that the second seed was trained with another learning rate."""
    make_run(tmp_path / "SEED=1", 50.0, "SEED", "1")
    make_run(tmp_path / "SEED=2", 60.0, "SEED", "2", "SOLVER.BASE_LR", "0.2")
    make_run(tmp_path / "SEED=3", 70.0, "SEED", "3")
    rows = table_of(capsys, str(tmp_path), "--group-by-seed")
    assert [(row["run"], row["classification/top1"]) for row in rows] == [
        ("SEED=1; SEED=3", "60.00 (50.00, 70.00)"),
        ("SEED=2", "60.00"),
    ]


FILES = (
    "results.json",
    "config.yaml",
    "metrics.json",
    "slurm/submission.json",
    "lease/000001/owner.json",
)


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_left_out(tmp_path, capsys, caplog, content):
    """In another user's folder, nothing is moved, and the other runs are shown."""
    make_run(tmp_path / "good", 50.0)
    damaged = [tmp_path / f"run{number}" / name for number, name in enumerate(FILES)]
    for file in damaged:
        shutil.copytree(tmp_path / "good", tmp_path / file.relative_to(tmp_path).parts[0])
        damage(file, content)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(tmp_path), "--group-by-seed"]) == 0
    assert "50.00" in capsys.readouterr().out
    said = [record.getMessage() for record in caplog.records]
    fine = {"metrics.json": [b""], "config.yaml": [b"", DAMAGES["other types"]]}
    for file in damaged:
        expected = content not in fine.get(file.name, [])
        assert sum(str(file) in line for line in said) == expected, file
    assert not any("\n" in line for line in said)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_config_that_is_not_understood_is_one_line(tmp_path, capsys, caplog):
    make_run(tmp_path / "run", 50.0)
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("resnet18", "resnet5"))
    assert main([str(tmp_path)]) == 0
    capsys.readouterr()
    assert main([str(tmp_path), "--cost"]) == 0
    assert "50.00" in capsys.readouterr().out
    (said,) = [each.getMessage() for each in caplog.records if "nearest" in each.getMessage()]
    assert "\n" not in said


@pytest.mark.parametrize(("number", "times"), [(12, 10), (2000, 1)])
def test_a_config_of_aliases_of_aliases_is_left_out(tmp_path, capsys, caplog, number, times):
    make_run(tmp_path / "run", 50.0)
    bomb = "a0: &a0 [x]\n" + "".join(
        f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * times)}]\n" for i in range(number)
    )
    (tmp_path / "run" / "config.yaml").write_text(bomb)
    assert main([str(tmp_path), "--group-by-seed"]) == 0
    assert "50.00" in capsys.readouterr().out
    assert any("aliases" in each.getMessage() for each in caplog.records)
