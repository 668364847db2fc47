"""Helpers for the processes of this machine."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from pathlib import Path

__all__ = ["machine_id", "process_environment", "process_start", "raise_open_files"]


def machine_id() -> str:
    """Returns a text that identifies this machine, its boot and the namespace of process ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # what cannot be read is left out
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def process_start(number: int) -> str:
    """Returns when a process of this machine started, in ticks since boot; "" if it is gone."""
    try:
        fields = Path(f"/proc/{int(number)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def process_environment(number: int) -> dict[str, str]:
    """Returns the initial environment of a process of this user; {} for other processes."""
    try:
        pairs = Path(f"/proc/{int(number)}/environ").read_text(errors="replace").split("\0")
    except (OSError, ValueError):
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def raise_open_files() -> None:
    """Raises this process's limit of open files, which its children inherit, to the hard limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid this
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
