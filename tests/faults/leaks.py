"""Checks a training run for leaks; tests/faults/soak.py runs it beside the other tests.

Memory, open files, threads and /dev/shm must stay constant after the warm-up:

    python tests/faults/leaks.py --minutes 30
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coco import make_coco
from conftest import SMALL
from disturbed import LEAF, members
from forks import ForkServer

from contnet.slurm.describe import last_metrics

# A checkpoint and an evaluation every few seconds.
OPTIONS = """
SOLVER.MAX_ITER 1000000 SOLVER.STEPS (999999,) SOLVER.CHECKPOINT_PERIOD 20 TEST.EVAL_PERIOD 50
SOLVER.IMS_PER_BATCH 4 SOLVER.GRAD_ACCUM_STEPS 2 SOLVER.EMA.ENABLED True SOLVER.BASE_LR 0.0001
DATALOADER.NUM_WORKERS 2 LOG_PERIOD 5
"""
# Allowed increase from the second to the last third of the time: variation of an allocator, and for
# each iteration the scalars in Detectron2's storage (up to a million iterations).
TOLERANCE = {"MB": 16, "open files": 1, "threads": 1}
KB_AN_ITERATION = 4
SECONDS = 2.0  # between two samples


def _sample(training: int, workers: list[int], run: Path) -> dict[str, float]:
    """Measures the resources of a training run and its loader workers."""
    shared = os.statvfs("/dev/shm")
    found = {
        "iteration": last_metrics(run)["iteration"],
        "shared memory MB": (shared.f_blocks - shared.f_bfree) * shared.f_frsize / 2**20,
    }
    for name, pids in (("training", [training]), ("workers", workers)):
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        found[f"{name} MB"] = pages * os.sysconf("SC_PAGESIZE") / 2**20
        found[f"{name} open files"] = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
        found[f"{name} threads"] = sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids)
    return found


def watch(folder: Path, seconds: float) -> list[dict[str, float]]:
    """Trains for some time; returns samples from the first evaluation on."""
    os.environ.update(DETECTRON2_DATASETS=str(make_coco(folder / "datasets")), OMP_NUM_THREADS="1")
    run, until, samples = folder / "run", time.monotonic() + seconds, []
    argv = ["--config-file", LEAF, *SMALL, *OPTIONS.split(), "OUTPUT_DIR", str(run)]
    process = ForkServer().start(argv, folder / "out")
    try:
        while not (run / "results.json").exists() and process.poll() is None:
            time.sleep(SECONDS)
        # Workers of evaluations are temporary.
        workers = [pid for pid in members(process.pid) if pid != process.pid]
        while time.monotonic() < until and process.poll() is None:
            samples.append(_sample(process.pid, workers, run))
            time.sleep(SECONDS)
        assert process.poll() is None, (folder / "out").read_text()[-3000:]
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
        while process.poll() is None:
            time.sleep(0.1)
    return samples


def report(samples: list[dict[str, float]]) -> tuple[str, bool]:
    """Returns a table of medians of the second and the last third, and whether nothing grows."""
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    lines, flat = ["| what | before | after |", "| --- | ---: | ---: |"], True
    for name in samples[0]:
        before, after = (statistics.median(each[name] for each in part) for part in (middle, last))
        lines.append(f"| {name} | {before:.0f} | {after:.0f} |")
        if name == "iteration":
            kept = (after - before) * KB_AN_ITERATION / 1024
        else:
            unit = next(unit for unit in TOLERANCE if name.endswith(unit))
            flat &= after - before <= TOLERANCE[unit] + kept * (name == "training MB")
    return "\n".join(lines), flat


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="contnet_leaks_") as folder:
            table, flat = report(watch(Path(folder), 60 * args.minutes))
    except KeyboardInterrupt:  # tests/faults/soak.py has failed
        return 1
    print(f"{args.minutes:g} minutes, medians of the second and the last third:\n\n{table}\n")
    print("flat" if flat else "FAILED: it grows", flush=True)
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
