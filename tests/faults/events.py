"""Events that disturb a training run: when they happen, and what they affect."""

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "FULL_DISK",
    "STARTING",
    "Event",
    "damage",
    "move_clock",
    "random_events",
    "small_disk",
    "why_no_tmpfs",
]

STARTING = "starting"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
DAMAGES = ("flip", "cut", "hole")
FULL_DISK = "full disk"
# Size of the file system that is filled: for the run's checkpoints of 64 MB, for those that a start
# sets aside, and one more.
DISK_MB = 700


@dataclass(frozen=True)
class Event:
    """An event in one start of a training.

    Attributes:
        what: a signal, or ``FULL_DISK``.
        phase: earliest phase of the training in which it happens.
        count: how often the training must have entered that phase since its start.
        delay: seconds after that.
        everyone: whether a signal reaches all processes of the run, or only one.
        damage: damage to the newest checkpoint afterwards; "" for none.
        clock: seconds by which the times of all files are then changed.
    """

    what: str
    phase: str
    count: int = 1
    delay: float = 0.0
    everyone: bool = True
    damage: str = ""
    clock: float = 0.0


def random_events(
    rng: random.Random, kind: str, number: int, disk: bool, kills: bool = False
) -> list[Event]:
    """Draws events for a run of a kind; with ``disk``, the file system may also fill up.

    With ``kills``, all events are SIGKILLs.
    """
    more = [FULL_DISK, FULL_DISK] if disk else []
    signals = ("SIGKILL", "SIGTERM", *("SIGUSR2",) * 4) if kind == "submitted" else SIGNALS
    choices = ["SIGKILL"] * 3 * (kind != "submitted") + [*signals, *more]
    if kills:
        choices = ["SIGKILL"]
    return [
        Event(
            what=rng.choice(choices),
            phase=rng.choice((STARTING, "training", "saving", "saving", *("evaluating",) * 3)),
            count=rng.choice((1, 1, 2)),
            delay=rng.random() * rng.choice((0.02, 0.3)),
            everyone=rng.random() < 0.5,
            damage=rng.choice(("", "", *DAMAGES)),
            clock=rng.choice((0, 0, 86400, -86400)),
        )
        for _ in range(number)
    ]


def damage(path: Path, how: str, rng: random.Random) -> None:
    size = path.stat().st_size
    place = rng.randrange(size)
    with open(path, "r+b") as file:
        if how == "cut":
            file.truncate(place)
            return
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes(2**16) if how == "hole" else bytes([byte ^ 1 << rng.randrange(8)]))
        file.truncate(size)


def move_clock(folder: Path, seconds: float) -> None:
    """Changes the times of files and in records, as if from a machine with another clock."""
    for path in folder.rglob("*"):
        if path.is_file():
            now = time.time() + seconds
            if path.suffix == ".json" and path.parent != folder:
                with contextlib.suppress(ValueError):  # the file was cut by a kill
                    content = json.loads(path.read_text())
                    if isinstance(content, dict) and isinstance(content.get("time"), float):
                        path.write_text(json.dumps({**content, "time": now}))
            os.utime(path, (now, now))


def why_no_tmpfs() -> str:
    """Returns why no small file system can be mounted here; "" if it can."""
    return "" if os.geteuid() == 0 else "only root can mount a small file system"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs"]
    subprocess.run(["mount", *options, str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
