"""Processes of this machine."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from pathlib import Path

__all__ = ["machine_id", "process_environment", "process_start", "raise_open_files"]


def machine_id() -> str:
    """Tells this boot of this machine, and this container's numbers of processes, from others."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # what is not told cannot differ
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def process_start(number: int) -> str:
    """When a process of this machine started, in ticks since the machine did; "" if it is gone."""
    try:
        fields = Path(f"/proc/{int(number)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def process_environment(number: int) -> dict[str, str]:
    """The environment that a process of this user's was started with; {} of any other."""
    try:
        pairs = Path(f"/proc/{int(number)}/environ").read_text(errors="replace").split("\0")
    except (OSError, ValueError):
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def raise_open_files() -> None:
    """Lets this process and its children have as many open files as they may: the hard limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a sandbox may refuse even this
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
