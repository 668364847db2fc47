"""Copies the code, so that a job runs the version that was submitted."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePath

from contnet.utils.errors import UserError
from contnet.utils.files import explain_os_error
from contnet.utils.text import printable

__all__ = ["LARGEST_FILE", "Code", "list_code", "looks_secret", "take_snapshot"]

# Bytes; a larger file is not code, but data that git was not told to ignore.
LARGEST_FILE = 20 * 2**20

_PACKAGE = Path(__file__).resolve().parents[1]
_SOURCES = {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".py", ".pyi"}
# Files that are copied even if git does not track them: programs, and what they may read.
_CODE = _SOURCES | {".cfg", ".sh", ".toml", ".yaml", ".yml"}
# Names of files and folders in which programs keep passwords and keys.
_SECRET_NAMES = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".git-credentials", ".npmrc"),
    *(".pypirc", ".pgpass", ".my.cnf", ".htpasswd", ".dockercfg", ".s3cfg", ".boto"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12", "*.pfx"),
    *("*.pkcs12", "*.jks", "*.keystore", "*.kdb", "*.kdbx", "*.ppk", "*.gpg", "*.asc"),
    *("kubeconfig*", "*.kubeconfig", "*service*account*"),
    *(".aws", ".azure", ".docker", ".gcloud", ".gnupg", ".huggingface", ".kube", ".ssh"),
)
_SECRET = r"(credentials?|secrets?|passwords?|passwd|(api|access|private|wandb)[-_]?keys?)"
_SECRET_FOLDER = re.compile(rf"(?<![a-z0-9]){_SECRET}(?![a-z0-9])")
_SECRET_FILE = re.compile(rf"(?<![a-z0-9])({_SECRET}|tokens?)(?![a-z0-9])")
# Source files may be about tokenizers or mix tokens, so "token" counts only at the end.
_SECRET_SOURCE = re.compile(rf"(?<![a-z0-9])({_SECRET}(?![a-z0-9])|token$)")


@dataclass(frozen=True)
class Code:
    """The files of a snapshot; names are relative to ``root``.

    Attributes:
        root: folder of the repository, or the one that contains the package.
        path: the package's parent folder, relative to ``root``.
        files: files to copy.
        untracked: those in ``files`` that git does not track.
        secret: not copied, may contain a password or key; tracked by git or not.
        large: not copied, larger than :data:`LARGEST_FILE`.
        other: not copied, not tracked by git and neither code nor configs.
    """

    root: Path
    path: str
    files: list[str]
    untracked: list[str]
    secret: list[str]
    large: list[str]
    other: list[str]

    def listing(self) -> str:
        """Returns all names as text, one per line."""
        taken = set(self.untracked)
        parts = {
            f"copied from {self.root}": [name for name in self.files if name not in taken],
            "copied, not tracked by git": self.untracked,
            "not copied, may contain a password or key": self.secret,
            "not copied, larger than 20 MiB": self.large,
            "not copied, not tracked by git and neither code nor config": self.other,
        }
        lines = []
        for title, names in parts.items():
            lines += [f"# {title}: {len(names)}", *names]
        return "".join(f"{printable(line, len(line))}\n" for line in lines)


def looks_secret(path: str, tracked: bool) -> bool:
    """Whether a file may contain a password or key, by its name and those of its folders.

    Args:
        path: path of the file.
        tracked: whether git tracks it. A tracked source file looks secret only if it is called
            ``secrets`` or similar, because other modules may need it.
    """
    parts = PurePath(path.lower()).parts
    if any(fnmatch.fnmatchcase(part, each) for part in parts for each in _SECRET_NAMES):
        return True
    name = PurePath(parts[-1])
    source = name.suffix in _SOURCES
    if source and tracked:
        return bool(re.fullmatch(_SECRET, name.stem))
    if any(_SECRET_FOLDER.search(part) for part in parts[:-1]):
        return True
    return bool(_SECRET_SOURCE.search(name.stem) if source else _SECRET_FILE.search(parts[-1]))


def _run_git(folder: Path, *arguments: str) -> str:
    """Returns the output of git, in which names need not be valid text.

    Raises:
        OSError, subprocess.SubprocessError: if there is no git, or no repository.
    """
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="surrogateescape", timeout=60, check=True
    )
    return done.stdout


def _git_files(folder: Path) -> tuple[Path, set[str], set[str]] | None:
    """Returns the root of a folder's repository, its tracked, and its other unignored files."""
    listing = ("ls-files", "-z", "--full-name")
    try:
        top = Path(_run_git(folder, "rev-parse", "--show-toplevel").removesuffix("\n"))
        tracked = _run_git(top, *listing, "--cached").split("\0")
        others = _run_git(top, *listing, "--others", "--exclude-standard").split("\0")
    except (OSError, subprocess.SubprocessError):
        return None
    return top, set(tracked) - {""}, set(others) - {""}


def _may_copy(path: Path, name: str, tracked: bool) -> bool:
    """Whether neither a file's name nor, for a link, its target looks secret."""
    names = [name, os.readlink(path)] if path.is_symlink() else [name]
    return not any(looks_secret(each, tracked) for each in names)


def list_code() -> Code:
    """Lists the files of a snapshot.

    They are the files that git tracks, and the code and configs that it neither tracks nor ignores;
    if the package is not in git, only the package. Links are copied as links.
    """
    package = _PACKAGE
    found = _git_files(package)
    inside = found is not None and package.is_relative_to(found[0])
    if inside and str((package / "__init__.py").relative_to(found[0])) in found[1] | found[2]:
        root, tracked, others = found
    else:  # installed, perhaps into an environment inside some repository
        root, others = package.parent, set()
        tracked = {
            str(path.relative_to(root))
            for path in package.rglob("*")
            if "__pycache__" not in path.parts and not path.is_dir()
        }
    code = Code(root, str(package.parent.relative_to(root)), [], [], [], [], [])
    for name in sorted(tracked | others):
        path, known = root / name, name in tracked
        link = path.is_symlink()
        if not link and not path.is_file():
            continue
        if not _may_copy(path, name, known):
            code.secret.append(name)
        elif not link and path.stat().st_size > LARGEST_FILE:
            code.large.append(name)
        elif not known and not link and path.suffix.lower() not in _CODE:
            code.other.append(name)
        else:
            code.files.append(name)
            code.untracked.extend([] if known else [name])
    return code


def _leads_into(code: Code, path: Path) -> bool:
    """Whether a path in the root is a copied file, or a folder with copied files."""
    if not path.is_relative_to(code.root):
        return False
    name = str(path.relative_to(code.root))
    return any(each == name or each.startswith(f"{name}/") for each in code.files)


def _copy_link(source: Path, target: Path, code: Code) -> None:
    """Copies a link; a relative one to a copied file leads to the copy, others to the original."""
    to = os.readlink(source)
    end = Path(os.path.normpath(source.parent / to))
    target.symlink_to(to if _leads_into(code, end) and not os.path.isabs(to) else end)


def take_snapshot(folder: Path) -> Path:
    """Copies the code into a new folder, and lists it next to the folder in ``FOLDER.txt``.

    Returns:
        The path for PYTHONPATH.

    Raises:
        UserError: if a file cannot be copied.
    """
    code = list_code()
    for name in code.files:
        source, target = code.root / name, folder / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                _copy_link(source, target, code)
            else:
                shutil.copy2(source, target)
        except OSError as error:
            reason = explain_os_error(error, target)
            raise UserError(f"{source} cannot be copied to {target}: {reason}") from error
    folder.with_suffix(".txt").write_text(code.listing(), encoding="utf-8")
    return folder / code.path
