"""Tests the pins, their ranges and the set-up script, without a network."""

import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
HASHED = ["build.txt", "lock.txt", "numpy1.txt", "detectron2.txt"]


def read_lines(name):
    """Returns the requirement lines of a file, with joined continuation lines, without comments."""
    text = (REQUIREMENTS / name).read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def read_pins(name):
    """Returns versions by name from a file of pins."""
    pins = {}
    for line in read_lines(name):
        requirement = Requirement(line.split(" --hash")[0])
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        assert requirement.name not in pins, f"{requirement.name} is pinned twice"
        pins[canonicalize_name(requirement.name)] = specifier.version
    return pins


def read_setup():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def declared(section="options", key="install_requires"):
    """Returns the requirements of a dependency list."""
    return [Requirement(line) for line in read_setup()[section][key].splitlines() if line]


EXTRAS = ("analysis", "export", "trackers", "docs", "test")
LISTS = [("options", "install_requires"), *(("options.extras_require", key) for key in EXTRAS)]


@pytest.mark.parametrize(("section", "key"), LISTS)
def test_every_dependency_has_a_reason_and_a_range(section, key):
    text = (ROOT / "setup.cfg").read_text()
    lines = re.search(rf"^{key} =\n((?:    .+\n)+)", text, re.MULTILINE).group(1).splitlines()
    reasons, lines = lines[0::2], lines[1::2]
    assert [str(Requirement(line)) for line in lines] == [str(r) for r in declared(section, key)]
    for reason, requirement in zip(reasons, declared(section, key), strict=True):
        assert re.match(r" {4}# \w", reason), (reason, requirement)
        assert {part.operator for part in requirement.specifier} == {">=", "<"}, requirement


@pytest.mark.parametrize(("section", "key"), LISTS)
def test_lock_is_within_the_ranges(section, key):
    pins = read_pins("lock.txt")
    for requirement in declared(section, key):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("name", HASHED)
def test_every_pin_has_a_hash(name):
    assert read_pins(name)
    for line in read_lines(name):
        assert re.search(r" --hash=sha256:[0-9a-f]{64}\b", line), line


def test_detectron2_is_installed_apart():
    apart = set(read_pins("detectron2.txt"))
    assert apart == {"sal-detectron2", "cityscapesscripts"}
    everything = {canonicalize_name(requirement.name) for requirement in declared()}
    everything |= set(read_pins("lock.txt"))
    assert not everything & (apart | {"detectron2"})


def test_build_tools_agree_with_the_lock():
    pins = read_pins("build.txt")
    assert set(pins) == {"pip", "setuptools"}
    assert pins["setuptools"] == read_pins("lock.txt")["setuptools"]


def test_pyproject_holds_only_the_build_system():
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())) == {"build-system"}


def test_numpy1_set_lies_within_the_ranges():
    pins = read_pins("numpy1.txt")
    assert pins["numpy"].startswith("1.26.")
    assert pins["opencv-python-headless"].startswith("4.")
    assert len(pins) == 2
    ranges = {requirement.name: requirement.specifier for requirement in declared()}
    assert all(version in ranges[name] for name, version in pins.items())


def test_existing_torch_file_is_setup_cfg_without_torch():
    expected = {r.name: str(r) for r in declared() if r.name not in ("torch", "torchvision")}
    expected["timm"] = f"timm=={read_pins('lock.txt')['timm']}"
    listed = [Requirement(line) for line in read_lines("existing-torch.txt")]
    assert {requirement.name: str(requirement) for requirement in listed} == expected


def installed_pins():
    """Returns the locked packages that are installed; skips in other environments."""
    pins = read_pins("lock.txt")
    versions = {
        canonicalize_name(dist.name): dist.version for dist in importlib.metadata.distributions()
    }
    if versions["torch"].split("+")[0] != pins["torch"]:
        pytest.skip("this environment was not made from the lock")
    return {name: version for name, version in pins.items() if name in versions}


def needs_of(name, python):
    """Yields an installed package's requirements on a Python version, without extras."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    for line in importlib.metadata.requires(name) or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield requirement


@pytest.mark.parametrize("overlay", [None, "numpy1.txt"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_lock_is_closed_and_consistent(python, overlay):
    replaced = read_pins(overlay) if overlay else {}
    pins = read_pins("lock.txt") | replaced
    names = set(installed_pins()) - set(replaced)
    if overlay:
        names -= {"ml-dtypes"}  # extra export, which needs numpy 2 (docs/install.md)
    assert len(names) > 50
    for name in names:
        for requirement in needs_of(name, python):
            version = pins[canonicalize_name(requirement.name)]
            assert version in requirement.specifier, f"{name} needs {requirement}, not {version}"


def test_only_pinned_packages_can_ask_for_torch():
    """pip may replace torch only for packages that require it, so these are pinned."""
    pinned = {
        requirement.name
        for requirement in map(Requirement, read_lines("existing-torch.txt"))
        if str(requirement.specifier).startswith("==")
    }
    asking = {
        name
        for name in installed_pins()
        for requirement in needs_of(name, "3.11")
        if canonicalize_name(requirement.name) in ("torch", "torchvision", "triton")
    }
    assert asking - {"torch", "torchvision"} == pinned
    for requirement in needs_of("timm", "3.11"):
        if requirement.name in ("torch", "torchvision"):
            assert not requirement.specifier, requirement


def test_only_contnet_is_a_top_level_package():
    distribution = importlib.metadata.distribution("contnet")
    assert distribution.read_text("top_level.txt").split() == ["contnet"]
    packages = {path.parent.name for path in (ROOT / "projects/ConTNet").glob("*/__init__.py")}
    assert packages == {"contnet"}


def test_versions_agree():
    import contnet

    assert read_setup()["metadata"]["version"] == contnet.__version__


@pytest.mark.numpy1
def test_arrays_pass_between_the_libraries():
    """numpy, OpenCV, Pillow, pycocotools, torch and Detectron2 accept each other's arrays."""
    import cv2
    import numpy as np
    import torch
    from pycocotools import mask as masks

    transforms = pytest.importorskip("detectron2.data.transforms")
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    tensor = torch.from_numpy(image)
    tensor[0, 0, 0] = 7
    assert image[0, 0, 0] == 7 and np.shares_memory(tensor.numpy(), image)
    assert cv2.flip(image, 1).tolist() == image[:, ::-1].tolist()
    resized = transforms.ResizeTransform(4, 6, 8, 12).apply_image(image)
    assert resized.shape == (8, 12, 3) and resized.dtype == np.uint8
    mask = np.asfortranarray(image[:, :, 0] > 9, dtype=np.uint8)
    assert (masks.decode(masks.encode(mask)) == mask).all()


# The set-up script runs on a copy of its files, with a Python whose environments only record the
# requested installations.

FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
    "-m venv")
        mkdir -p "$3/bin"
        cp "{folder}/environment-python" "$3/bin/python"
        ;;
    "-V "*) echo "Python {version}" ;;
    *) exec "{real}" -c "import sys; {before}; $2" ;;
esac
"""
FAKE_ENVIRONMENT_PYTHON = """#!/bin/sh
case "$*" in
    -c*) echo "{folder}/site" ;;
    *) echo "$*" >>"{folder}/calls" ;;
esac
if [ -e "{folder}/broken" ] && echo "$*" | grep -q -e "$(cat "{folder}/broken")"; then
    echo "ERROR: no space left" && exit 1
fi
"""

# Settings with which pip has no index.
NO_INDEX = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_FIND_LINKS": "",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_NO_CACHE_DIR": "1",
}


def write_script(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def setup_folder(tmp_path):
    root = tmp_path / "project"
    (root / "tools").mkdir(parents=True)
    shutil.copytree(REQUIREMENTS, root / "requirements")
    for name in ("setup.cfg", "pyproject.toml", "tools/setup_env.sh"):
        shutil.copy(ROOT / name, root / name)
    write_script(tmp_path / "environment-python", FAKE_ENVIRONMENT_PYTHON.format(folder=tmp_path))
    return tmp_path


def add_python(folder, name="python3", version="3.12.0", before="pass"):
    (folder / "bin").mkdir(exist_ok=True)
    text = FAKE_PYTHON.format(folder=folder, version=version, real=sys.executable, before=before)
    write_script(folder / "bin" / name, text)


def pretend(version):
    """Returns Python code that makes the interpreter report a version."""
    return f"sys.version_info = {tuple(int(part) for part in version.split('.'))}"


def run_setup(folder, *arguments, **environment):
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        **environment,
    }
    return subprocess.run(
        ["sh", folder / "project/tools/setup_env.sh", folder / "env", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def installs(folder):
    """Returns the pip calls since the last call of this function."""
    calls = folder / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return lines


def assert_one_line_error(result, *words):
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    for word in words:
        assert word in line


@pytest.mark.parametrize("version", ["3.8.18", "3.10.13", "3.14.0"])
def test_setup_names_an_unsuitable_python(setup_folder, version):
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        add_python(setup_folder, name, version, pretend(version))
    expected = ("3.11 to 3.13", version, "PYTHON=")
    assert_one_line_error(run_setup(setup_folder), *expected)
    assert_one_line_error(run_setup(setup_folder, "python3.12"), "python3.12", *expected)
    assert not (setup_folder / "env").exists()


def test_setup_names_a_missing_python(setup_folder):
    assert_one_line_error(run_setup(setup_folder, "python3.99"), "python3.99 is not to be found")


def test_setup_names_a_missing_venv_module(setup_folder):
    add_python(setup_folder, before="sys.modules['ensurepip'] = None")
    assert_one_line_error(run_setup(setup_folder, "python3"), "python3 has no venv", "apt install")
    assert not (setup_folder / "env").exists()


def test_setup_looks_for_another_python(setup_folder):
    add_python(setup_folder, "python3", "3.9.0", pretend("3.9.0"))
    add_python(setup_folder, "python3.11", "3.11.0", "sys.modules['ensurepip'] = None")
    assert_one_line_error(run_setup(setup_folder), "python3.11 has no venv")


def test_setup_installs_once_and_refreshes_when_a_pin_changes(setup_folder):
    add_python(setup_folder)
    assert run_setup(setup_folder).returncode == 0
    calls = installs(setup_folder)
    assert [call.split()[-1] for call in calls] == [
        "requirements/build.txt",
        "requirements/lock.txt",
        "requirements/detectron2.txt",
        ".",
    ]
    assert all("--require-hashes" in call for call in calls[:-1])

    again = run_setup(setup_folder)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert installs(setup_folder) == []

    kept = setup_folder / "env/kept"
    kept.touch()
    with (setup_folder / "project/requirements/lock.txt").open("a") as lock:
        lock.write("# changed\n")
    assert run_setup(setup_folder).returncode == 0
    assert len(installs(setup_folder)) == 4
    assert kept.exists()

    shutil.move(setup_folder / "project", setup_folder / "moved")
    shutil.copytree(setup_folder / "moved", setup_folder / "project")
    assert run_setup(setup_folder).stdout == ""

    add_python(setup_folder, before="sys.version = '3.12.1 (another)'")
    assert run_setup(setup_folder).returncode == 0
    assert len(installs(setup_folder)) == 4
    assert not kept.exists()


@pytest.mark.parametrize("step", ["build.txt", "lock.txt", "detectron2.txt", "-e ."])
def test_an_interrupted_setup_is_done_again(setup_folder, step):
    add_python(setup_folder)
    (setup_folder / "broken").write_text(step)
    assert_one_line_error(run_setup(setup_folder), "ERROR: no space left", "setup.log")
    (setup_folder / "broken").unlink()
    leftover = setup_folder / "env/half-installed"
    leftover.touch()
    installs(setup_folder)
    assert run_setup(setup_folder).returncode == 0
    assert len(installs(setup_folder)) == 4
    assert not leftover.exists()


def test_setup_makes_a_broken_environment_again(setup_folder):
    add_python(setup_folder)
    assert run_setup(setup_folder).returncode == 0
    python = setup_folder / "env/bin/python"
    python.unlink()
    assert run_setup(setup_folder).returncode == 0
    assert python.exists()


def test_setup_does_not_disturb_another(setup_folder):
    add_python(setup_folder)
    (setup_folder / "env").mkdir()
    (setup_folder / "env/.contnet-setup").write_text(f"unfinished {os.getpid()}\n")
    assert_one_line_error(run_setup(setup_folder), f"process {os.getpid()}", "wait")
    assert installs(setup_folder) == []


def test_setup_leaves_foreign_folders_alone(setup_folder):
    add_python(setup_folder)
    (setup_folder / "env").mkdir()
    precious = setup_folder / "env/precious"
    precious.touch()
    assert_one_line_error(run_setup(setup_folder), "not made by this set-up", "VENV=")
    assert precious.exists()


def test_setup_without_a_network(setup_folder):
    """Uses a real environment and a real pip, whose index refuses connections.

    The environment is remade with its own Python, as when it is active.
    """
    command = [sys.executable, "-m", "venv", "--without-pip", setup_folder / "env"]
    subprocess.run(command, check=True)
    (setup_folder / "env/.contnet-setup").write_text("unfinished 999999999\n")
    result = run_setup(setup_folder, setup_folder / "env/bin/python3", **NO_INDEX)
    assert_one_line_error(result, "cannot be reached", "network")
