"""The copy of the code that a job runs."""

import os
import shutil
import subprocess
import sys

import pytest

from contnet.slurm import snapshot


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a package of this project's shape."""
    root = tmp_path / "repository"
    package = root / "projects" / "contnet"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("value = 1\n")
    (root / ".gitignore").write_text("ignored.txt\n")
    for name in ("ignored.txt", "new.txt", "gone.txt"):
        (root / name).write_text(name)
    (root / "link").symlink_to("new.txt")
    (root / "data").symlink_to("../elsewhere")
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "projects", ".gitignore", "gone.txt"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    (root / "gone.txt").unlink()
    monkeypatch.setattr(snapshot, "_PACKAGE", package)
    return root


def test_snapshot_of_a_repository(repository, tmp_path):
    with open(repository / "large.bin", "wb") as file:
        file.truncate(snapshot.LARGEST_FILE + 1)
    path = snapshot.take_snapshot(tmp_path / "copy")
    copied = {str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*")}
    files = {"projects/contnet/__init__.py", ".gitignore", "new.txt", "link", "data"}
    assert copied == {"projects", "projects/contnet", *files}
    assert snapshot.list_code()[2] == ["large.bin"]
    assert os.readlink(tmp_path / "copy" / "link") == "new.txt"
    assert os.readlink(tmp_path / "copy" / "data") == str(tmp_path / "elsewhere")
    assert path == tmp_path / "copy" / "projects"
    (repository / "projects" / "contnet" / "__init__.py").write_text("value = 2\n")
    command = [sys.executable, "-c", "import contnet; print(contnet.value)"]
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    where = repository / "projects"  # has a package contnet too
    done = subprocess.run(command, env=environment, cwd=where, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_snapshot_outside_git(repository, tmp_path):
    shutil.rmtree(repository / ".git")
    snapshot.take_snapshot(tmp_path / "copy")
    copied = [p for p in (tmp_path / "copy").rglob("*") if p.is_file()]
    assert copied == [tmp_path / "copy" / "contnet" / "__init__.py"]
