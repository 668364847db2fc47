"""The comparison of classifiers: one recipe, one table, finished trainings kept."""

import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import REPOSITORY

from contnet.commands.compare import main, table
from contnet.config import load_config

RECIPE = """
MODEL.DEVICE cpu MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 56 SOLVER.IMS_PER_BATCH 4
INPUT.CLASSIFIER.RESIZE_TEST 64 INPUT.CLASSIFIER.CROP_TEST 56 SOLVER.MAX_ITER 4 LOG_PERIOD 1
SOLVER.WARMUP_ITERS 1 DATALOADER.NUM_WORKERS 0
"""
NETWORKS = ["contnet_ti", "resnet18"]


def command(folder: Path, *more: str) -> list[str]:
    base = str(REPOSITORY / "configs" / "imagenet" / "Base-plain.yaml")
    options = ["--config-file", base, "--output", str(folder), "--networks", ",".join(NETWORKS)]
    return [*options, *more, *RECIPE.split()]


@pytest.mark.slow
def test_networks_are_trained_alike_and_kept(imagenet_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def compared() -> list[dict]:
        return json.loads((tmp_path / "compare.json").read_text())

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model_final.pth")}

    only = ["--only", "resnet18", "SOLVER.BASE_LR 0.05 MODEL.CLASSIFIER.DROP_PATH_RATE 0.1"]
    assert main(command(tmp_path, "--num-gpus", "1", *only)) == 0
    printed = capsys.readouterr().out
    assert f"| resnet18 ({only[-1]}) |" in printed and "| contnet_ti |" in printed
    first, trained = compared(), times()
    assert [(row["network"], row["seed"]) for row in first] == [(name, 1) for name in NETWORKS]
    assert table(first) in printed

    # Another seed of one of them: its finished training and the rows of the others are kept.
    assert main(command(tmp_path, "--seeds", "1,2", "--networks", "contnet_ti")) == 0
    rows, all_times = compared(), times()
    assert [row for row in rows if row["seed"] == 1] == first[::-1]
    assert [row["network"] for row in rows if row["seed"] == 2] == ["contnet_ti"]
    assert table(rows[1:]) in capsys.readouterr().out
    assert len(all_times) == 3 and trained.items() <= all_times.items()
    # Seeds start from different weights.
    stems = [
        torch.load(tmp_path / f"contnet_ti_seed{seed}" / "model_final.pth")["model"]
        for seed in (1, 2)
    ]
    assert not torch.equal(*(stem["network.stem.weight"] for stem in stems))

    configs = []
    for row in rows:
        run = tmp_path / f"{row['network']}_seed{row['seed']}"
        (result,) = json.loads((run / "results.json").read_text())
        assert row["top1"] == result["metrics"]["classification"]["top1"]
        network = timm.create_model(row["network"], num_classes=7)
        assert row["parameters_m"] == pytest.approx(
            sum(p.numel() for p in network.parameters()) / 1e6
        )
        assert 100 < row["memory_mb"] < 20000 and row["images_per_second"] > 0
        lines = (run / "config.yaml").read_text().splitlines()
        own = ("    NAME:", "SEED:", "OUTPUT_DIR:", "  BASE_LR:", "    DROP_PATH_RATE:")
        configs.append([line for line in lines if not line.startswith(own)])
        alone = row["network"] == "resnet18"
        assert ("  BASE_LR: 0.05" in lines) == ("    DROP_PATH_RATE: 0.1" in lines) == alone
    assert all(config == configs[0] for config in configs)

    assert main(command(tmp_path, *only)) == 0
    assert times() == all_times
    assert sorted(compared(), key=str) == sorted(rows, key=str)


def test_a_training_with_other_settings_is_not_kept(tmp_path, capsys):
    folder = tmp_path / "contnet_ti_seed1"
    folder.mkdir()
    own = ["MODEL.CLASSIFIER.NAME", "contnet_ti", "SEED", "1", "OUTPUT_DIR", str(folder)]
    base = str(REPOSITORY / "configs" / "imagenet" / "Base-plain.yaml")
    cfg = load_config(base, [*RECIPE.split(), *own, "SOLVER.BASE_LR", "0.3"])
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "model_final.pth").touch()
    assert main(command(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "a training with other settings (SOLVER.BASE_LR)" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--seeds -1", "'-1' must be whole numbers from 0"),
        ("--seeds 1,x", "'1,x' must be whole numbers from 0"),
        ("--seeds 1,01", "each once"),
        ("--networks resnet18,resnet18", "must be names with commas between, each once"),
        ("--networks resnet18,", "must be names"),
        ("--only resnet50 a", "--only resnet50 is not one of --networks contnet_ti,resnet18"),
        ("--only resnet18 SOLVER.BASE", "'SOLVER.BASE' is not in pairs KEY VALUE"),
        ("SEED 3", "SEED has no effect here, it is what --seeds gives"),
        ("--only resnet18 'a", "No closing quotation"),
        ("--num-gpus 0", "--num-gpus is 0, it must be at least 1"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, options, said):
    networks = [] if "only" in options else ["--networks", "resnet18"]
    assert main([*command(tmp_path), *networks, *options.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize("content", ["[{", "", "{}", '[{"network": "resnet18"}]', "[3]", "3"])
def test_damaged_rows_are_one_line(tmp_path, capsys, content):
    (tmp_path / "compare.json").write_text(content)
    assert main(command(tmp_path)) == 1
    error = capsys.readouterr().err
    assert f"error: {tmp_path}/compare.json" in error and error.count("\n") == 1
    assert "remove it" in error


def test_a_network_that_timm_lacks_is_one_line(tmp_path, capsys):
    assert main([*command(tmp_path), "--networks", "contnet_ti,resnet5"]) == 1
    error = capsys.readouterr().err
    assert "nearest is" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*/model*.pth"))


def test_table_says_what_was_not_measured():
    row = {
        "network": "contnet_s",
        "seed": 1,
        "top1": 50.0,
        "images_per_second": None,
        "memory_mb": None,
        "parameters_m": 10.1,
        "operations_g": 1.49,
        "operations_with_attention_g": 1.67,
    }
    last = table([row, {**row, "seed": 2, "top1": 60.0}]).splitlines()[-1]
    assert "| 55.00 | 50.00 (1), 60.00 (2) | 10.10 | 1.49 / 1.67 |" in last
    assert last.count("not measured") == 2
