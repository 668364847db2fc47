"""Tests the copy of the code that a job runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from submissions import GPU, JOB, LEAF

from contnet.slurm import snapshot
from contnet.slurm.submit import main

pytest_plugins = ["submissions"]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Makes a repository with a package like this project's."""
    root = tmp_path / "repository"
    package = root / "projects" / "contnet"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("value = 1\n")
    (root / ".gitignore").write_text("ignored.txt\n")
    for name in ("ignored.txt", "new.py", "gone.txt"):
        (root / name).write_text(name)
    (root / "link").symlink_to("new.py")
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
    files = {"projects/contnet/__init__.py", ".gitignore", "new.py", "link", "data"}
    assert copied == {"projects", "projects/contnet", *files}
    assert snapshot.list_code().large == ["large.bin"]
    assert os.readlink(tmp_path / "copy" / "link") == "new.py"
    assert os.readlink(tmp_path / "copy" / "data") == str(tmp_path / "elsewhere")
    assert path == tmp_path / "copy" / "projects"
    (repository / "projects" / "contnet" / "__init__.py").write_text("value = 2\n")
    command = [sys.executable, "-c", "import contnet; print(contnet.value)"]
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    where = repository / "projects"  # also has a package contnet
    done = subprocess.run(command, env=environment, cwd=where, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_snapshot_outside_git(repository, tmp_path):
    shutil.rmtree(repository / ".git")
    snapshot.take_snapshot(tmp_path / "copy")
    copied = [p for p in (tmp_path / "copy").rglob("*") if p.is_file()]
    assert copied == [tmp_path / "copy" / "contnet" / "__init__.py"]


SECRETS = """
    .env .env.local prod.env id_rsa id_ed25519.old deploy.pem server.key .netrc .git-credentials
    .npmrc .pypirc credentials credentials.json aws_credentials.yaml secrets.yaml secrets.py
    hf_token token.txt wandb_key.txt API-KEY.sh passwords.kdbx .aws/config .ssh/config
    kubeconfig.yaml my-service-account.json projects/.env projects/contnet/secrets/all.yaml
"""
# Secrets only if git does not track them, because other modules may import them.
SECRET_MODULES = [
    "aws_credentials.py",
    "my_secrets.py",
    "hf_token.py",
    "token.py",
    "secrets/mine.py",
]
CODE = """
    mine.py configs/mine.yaml run.sh tokenizer.py token_mixer.py key_mapping.py environment.yml
    models/tokens/vit.py op.cu setup.cfg keyboard.py env.py configs/tokens/train.yaml
"""
OTHER = ["notes.txt", "images/1.jpg", "train.json", "results.csv", "look.ipynb", "a b\n\x1b[2J.bin"]


def write(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("content")


@pytest.mark.parametrize("tracked", [False, True])
def test_secrets_are_never_copied(repository, tmp_path, tracked):
    """Of untracked files, only code and configs are copied; of tracked files, all but secrets."""
    secrets, sources = SECRETS.split(), CODE.split()
    (sources if tracked else secrets).extend(SECRET_MODULES)
    write(repository, [*secrets, *sources, *OTHER])
    for link, to in (
        ("keys.yaml", ".env"),
        ("home.yaml", "/home/me/.ssh/id"),
        ("id_rsa.yaml", "x"),
    ):
        (repository / link).symlink_to(to)
    if tracked:
        subprocess.run(["git", "-C", str(repository), "add", "."], check=True)
    path = snapshot.take_snapshot(tmp_path / "copy").parent
    copied = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_symlink() or p.is_file()}
    assert not copied & {*secrets, "keys.yaml", "home.yaml", "id_rsa.yaml"}
    assert set(sources) <= copied
    assert copied >= set(OTHER) if tracked else not copied & set(OTHER)
    code, listing = snapshot.list_code(), (tmp_path / "copy.txt").read_text().splitlines()
    assert set(code.files) == copied and set(secrets) < set(code.secret)
    assert set(sources) <= set(code.untracked) or tracked
    assert {*copied - set(OTHER), *secrets, r"a b\n\x1b[2J.bin"} <= set(listing)


def test_the_projects_own_files_are_all_copied():
    code = snapshot.list_code()
    assert code.secret == code.large == []
    assert "projects/ConTNet/contnet/report/templates/page.html" in code.files


def test_a_link_to_what_is_not_copied_leads_to_the_original(repository, tmp_path):
    write(repository, ["labels.txt", "sets/one.txt"])
    (repository / "labels.yaml").symlink_to("labels.txt")
    (repository / "more").symlink_to("sets")
    snapshot.take_snapshot(tmp_path / "copy")
    for name in ("labels.yaml", "more/one.txt"):
        assert (tmp_path / "copy" / name).resolve() == (repository / name).resolve()


def test_names_that_are_no_text(repository, tmp_path):
    name = os.fsdecode(b"\xff.py")
    write(repository, [name])
    snapshot.take_snapshot(tmp_path / "copy")
    assert (tmp_path / "copy" / name).exists() and r"\udcff.py" in (
        tmp_path / "copy.txt"
    ).read_text()


def test_a_preview_says_what_is_copied(slurm, here, repository, capsys):
    write(repository, ["mine.py", ".env", "notes.txt"])
    argv = ["--config-file", LEAF, *JOB, *GPU, "--dry-run", "OUTPUT_DIR", "out"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    for line in ("not tracked by git: ", "password or key: .env", "nor code or configs: notes.txt"):
        assert line in shown
    assert "mine.py" in shown
