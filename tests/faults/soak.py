"""Disturbs training runs and damages files at random, and checks a run for leaks.

This is not part of the tests; it runs for any time:

    make soak MINUTES=60 SEED=1
    python tests/faults/soak.py --kills 200 --seed 1

For three quarters of the time, runs are disturbed (tests/faults/disturbed.py); for the last
quarter, tests/hostile draws its files with new seeds. Another run trains beside both; its memory,
open files, threads and /dev/shm must not grow. The first failed check ends the script with status
1; the folder of the run is kept. tests/slurm/soak.py does the same on a private SLURM cluster.
"""

import argparse
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coco import make_coco
from disturbed import KINDS, Lab
from events import random_events, why_no_tmpfs

TESTS = Path(__file__).resolve().parents[1]
# Maximum number of disturbances of a run. (A start in one process is the cheapest.)
MOST = {"one process": 12, "two processes": 4, "submitted": 4}
WEIGHTS = (4, 1, 1)
OF_KILLS = (4, 1, 0)


def _kills(tally: Counter) -> int:
    return sum(count for name, count in tally.items() if name.startswith("SIGKILL"))


def disturb_runs(folder: Path, seed: int, until: float, kills: int = 0) -> Counter:
    """Disturbs runs one after the other; returns the counted events.

    Args:
        folder: folder for the runs.
        seed: seed of the events.
        until: end time, by time.monotonic().
        kills: number of SIGKILLs after which to end instead, without other events.
    """
    lab, tally = Lab(folder, make_coco(folder / "datasets")), Counter()
    if reason := why_no_tmpfs():
        print(f"no disk is filled: {reason}")
    while _kills(tally) < kills if kills else time.monotonic() < until:
        number = tally["runs"]
        rng = random.Random(f"{seed} {number}")
        (kind,) = rng.choices(list(KINDS), OF_KILLS if kills else WEIGHTS)
        disk = rng.random() < 0.25 and kind != "submitted" and not kills and not why_no_tmpfs()
        events = random_events(rng, kind, rng.randint(1, MOST[kind]), disk, bool(kills))
        begun = time.monotonic()
        happened = lab.run(f"run{number}", kind, events, seed, disk)
        shutil.rmtree(folder / f"run{number}", ignore_errors=True)
        what = ", ".join(f"{count} {name}" for name, count in happened.items() if count)
        place = " on a small disk" if disk else ""
        seconds = time.monotonic() - begun
        print(
            f"run {number}, {kind}{place}: as undisturbed after {what} ({seconds:.0f} s)",
            flush=True,
        )
        tally += happened + Counter(runs=1)
    return tally


def fuzz(seed: int, until: float) -> int:
    """Runs the hostile file tests with new seeds until the time is over; returns the rounds."""
    rounds = 0
    while not rounds or time.monotonic() < until:
        options = ["-x", "-p", "no:cacheprovider", f"--hypothesis-seed={seed + rounds}"]
        options += ["--timeout=0"]  # for many examples on a busy machine
        command = [sys.executable, "-m", "pytest", str(TESTS / "hostile"), *options]
        subprocess.run(command, env={**os.environ, "HYPOTHESIS_PROFILE": "soak"}, check=True)
        rounds += 1
    return rounds


def table(tally: Counter) -> str:
    """Formats the counts in Markdown."""
    lines = ["| what | how often |", "| --- | ---: |"]
    lines += [f"| {name} | {count} |" for name, count in sorted(tally.items())]
    lines += [f"| all SIGKILLs | {_kills(tally)} |", "| mismatches, unreadable | 0 |"]
    return "\n".join(lines)


def soak(folder: Path, seed: int, minutes: float) -> int:
    """Runs everything beside a watched training; returns 1 if that leaks, otherwise 0."""
    begun = time.monotonic()
    leaks = [sys.executable, str(TESTS / "faults" / "leaks.py"), f"--minutes={minutes}"]
    watched = subprocess.Popen(["nice", *leaks])
    try:
        print(table(disturb_runs(folder, seed, begun + 45 * minutes)), flush=True)
        rounds = fuzz(seed, begun + 60 * minutes)
        print(f"hostile files: {rounds} rounds of the tests, by seeds from {seed}", flush=True)
        return watched.wait()
    finally:
        watched.send_signal(signal.SIGINT)  # ends its training


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0, help="so many SIGKILLs, and nothing else")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="contnet_soak_"))
    print(f"seed {args.seed}, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPUs, in {folder}")
    begun, status = time.monotonic(), 0
    try:
        if args.kills:
            print(table(disturb_runs(folder, args.seed, math.inf, args.kills)))
        else:
            status = soak(folder, args.seed, args.minutes)
    except (AssertionError, subprocess.CalledProcessError) as error:
        print(f"FAILED after {(time.monotonic() - begun) / 60:.0f} minutes: {error}")
        print(f"what is left is in {folder}")
        return 1
    shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
