"""Records how a run was started: command, code, versions, seed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm

from contnet.utils.addresses import redact
from contnet.utils.files import NO_GUARD, WriteGuard, atomic_write
from contnet.utils.packages import installed_versions
from contnet.utils.records import recover_record

__all__ = ["COMMIT_VARIABLE", "RUN_FILE", "git_commit", "record_run"]

# Environment variable with the commit of a snapshot of the code outside git.
COMMIT_VARIABLE = "CONTNET_GIT_COMMIT"
RUN_FILE = "run.json"


def git_commit() -> str:
    """The commit of the running code, with "+" if files differ from it; "" outside git."""
    if COMMIT_VARIABLE in os.environ:
        return os.environ[COMMIT_VARIABLE]
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        answer = subprocess.run(
            [*git, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _command() -> list[str]:
    """Returns the command line, beginning with the console script or with Python and a script."""
    script, *arguments = map(redact, sys.argv)
    console = script.startswith("contnet ")
    return [*(script.split() if console else [sys.executable, script]), *arguments]


def record_run(cfg: CfgNode, seed: int, start_iter: int, guard: WriteGuard = NO_GUARD) -> None:
    """Appends this attempt of the run to run.json, a list.

    Args:
        cfg: the config, of which OUTPUT_DIR and MODEL.DEVICE are read.
        seed: seed of the order of images and of all random state.
        start_iter: the first iteration of this attempt.
        guard: as in :func:`contnet.utils.files.atomic_write`.
    """
    path = Path(cfg.OUTPUT_DIR, RUN_FILE)
    attempts = recover_record(path, list[dict]) or []
    attempts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": _command(),
            "folder": str(Path.cwd()),
            "host": platform.node(),
            "git_commit": git_commit(),
            "versions": installed_versions(),
            "device": cfg.MODEL.DEVICE,
            "processes": comm.get_world_size(),
            "seed": seed,
            "start_iter": start_iter,
        }
    )
    with atomic_write(path, "w", guard) as file:
        json.dump(attempts, file, indent=1)
