"""Tests the built wheel in an empty folder: it trains a shipped config and predicts."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

from contnet.commands.console import COMMANDS
from contnet.config.shipped import SHIPPED_CONFIGS, find_config

# Tools that need the repository.
OF_THE_REPOSITORY = {"benchmark", "compare_checkouts", "gpu_check", "model_zoo"}
SHAPES = """
from contnet.data.datasets.shapes import make_shapes, shapes_datasets
make_shapes("shapes", num_train=8, num_val=4)
print(shapes_datasets("shapes"))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Builds the wheel of a copy, because setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("projects", "configs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored, symlinks=True)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    command = [sys.executable, "-m", "pip", *build, "--wheel-dir", "wheels"]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    (wheel,) = (folder / "wheels").iterdir()
    return wheel


def test_it_has_all_files(wheel):
    package = REPOSITORY / "projects/ConTNet/contnet"
    templates = {
        f"contnet/report/templates/{path.name}" for path in (package / "report/templates").iterdir()
    }
    configs = {
        f"contnet/{path.relative_to(REPOSITORY)}"
        for path in (REPOSITORY / "configs").rglob("*.yaml")
    }
    modules = {f"contnet/{path.relative_to(package)}" for path in package.rglob("*.py")}
    assert templates and configs
    expected = templates | configs | modules | {"contnet/py.typed"}
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_it_trains_and_predicts_from_an_empty_folder(wheel, tmp_path):
    installed, here = tmp_path / "installed", tmp_path / "here"
    here.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(installed), str(wheel)], check=True, timeout=300)
    variables = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    variables.pop("DETECTRON2_DATASETS", None)

    def python(*arguments) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=here, env=variables, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def contnet(*arguments) -> str:
        return python(installed / "bin" / "contnet", *arguments)

    place = python("-c", "import contnet; print(contnet.__file__)")
    assert Path(place.strip()).is_relative_to(installed)
    sets = python("-c", SHAPES).splitlines()[-1]
    options = ("SOLVER.MAX_ITER", 5, "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", 1)
    options += ("DATASETS.REGISTER", sets, "OUTPUT_DIR", "run", "DATALOADER.NUM_WORKERS", 0)
    contnet("train", "--config-file", "demo", *options)
    (record,) = json.loads((here / "run" / "run.json").read_text())
    assert record["command"][:4] == ["contnet", "train", "--config-file", "demo"]
    output = contnet("predict", "run", "shapes/val", "--output", "found", "--device", "cpu")
    assert json.loads((here / "found" / "predictions.json").read_text()) is not None, output
    assert len(list((here / "found" / "images").iterdir())) == 4
    assert "usage: contnet predict" in contnet("predict", "--help")
    assert "configs/fcos_contm.yaml" in contnet("configs", "list", "fcos")


def test_each_script_is_a_command():
    scripts = {path.stem for path in (REPOSITORY / "tools").glob("*.py")} - OF_THE_REPOSITORY
    assert {name.replace("-", "_") for name in COMMANDS} == scripts | {"train"}
    for path in (REPOSITORY / "tools").glob("*.py"):
        for module in [
            module for name, (module, _) in COMMANDS.items() if name.replace("-", "_") == path.stem
        ]:
            assert f"from {module} import main" in path.read_text()


def test_names_of_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = str(SHIPPED_CONFIGS / "imagenet" / "contm_strong.yaml")
    for name in ("imagenet/contm_strong", "configs/imagenet/contm_strong.yaml"):
        assert find_config(name) == whole
    for name in ("nothing", "/imagenet/contm_strong", "../configs/demo", ""):
        assert find_config(name) == name
    # An existing file takes precedence over a shipped config with its name.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("")
    assert find_config("configs/demo.yaml") == "configs/demo.yaml"
    assert find_config("demo") == str(SHIPPED_CONFIGS / "demo.yaml")


def test_an_unknown_command(capsys, monkeypatch):
    from contnet.commands.console import main

    monkeypatch.setattr(sys, "argv", ["contnet", "trian"])
    assert main() == 2
    assert "train" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["contnet"])
    assert main() == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*COMMANDS, "--help"))
