"""Disturbs toy jobs at random moments for any time; not part of the tests.

Signals, requeues, killed ranks, failing nodes and other jobs come in an order set by the seed. A
failed job, such as one with a killed rank, is submitted again with ``--resume``. Every run must end
with the same weights and metrics as an undisturbed run, bit for bit:

    python tests/slurm/soak.py --minutes 60 --seed 1
"""

import argparse
import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster import NODES, why_no_slurm
from coco import make_coco
from jobs import Lab, run_here, running_lab, same_training, starts_of

from contnet.slurm.status import read_status

OPTIONS = ("SOLVER.CHECKPOINT_PERIOD", "7", "TEST.EVAL_PERIOD", "12")
FAULTS = {"pace": 0.2, "save": 0.3, "evaluation": 0.3}
SHAPES = ((1, 1), (2, 1), (1, 2))  # nodes, tasks per node
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
# Maximum number of disturbances of a run, after which it may end.
MOST = 6


def _signal(name: str):
    def send(lab: Lab, job, rng: random.Random) -> None:
        # scancel tries for minutes if the job is between two states.
        with contextlib.suppress(subprocess.TimeoutExpired):
            lab.cluster.ask("scancel", f"--signal={name}", job.job_id, check=False)

    return send


def _requeue(lab: Lab, job, rng: random.Random) -> None:
    lab.cluster.ask("scontrol", "requeue", job.job_id, check=False)


def _kill_rank(lab: Lab, job, rng: random.Random) -> None:
    tasks = lab.cluster.tasks(job.job_id)
    if tasks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(tasks[rng.choice(sorted(tasks))], signal.SIGKILL)


def _fail_node(lab: Lab, job, rng: random.Random) -> None:
    _away(lab, rng, lab.cluster.fail_node)


def _kill_daemon(lab: Lab, job, rng: random.Random) -> None:
    _away(lab, rng, lab.cluster.kill_daemon)


def _away(lab: Lab, rng: random.Random, take) -> None:
    """Makes a node unavailable, for a time that SLURM may or may not notice."""
    node = rng.choice(NODES)
    take(node)
    time.sleep(rng.uniform(1, 20))
    lab.cluster.ask("slurmd", "-N", node)


def _preempt(lab: Lab, job, rng: random.Random) -> None:
    options = ("-purgent", "-N2", "--exclusive", "--output=/dev/null")
    lab.cluster.ask("sbatch", *options, f"--wrap=sleep {rng.randrange(5)}")


EVENTS = {
    "USR2": _signal("USR2"),
    "TERM": _signal("TERM"),
    "requeue": _requeue,
    "kill -9 of a rank": _kill_rank,
    "node fails": _fail_node,
    "slurmd killed": _kill_daemon,
    "preemption": _preempt,
}


class Soak:
    """Disturbs runs.

    Args:
        lab: lab with a running cluster.
        seed: seed of the events and their times.
    """

    def __init__(self, lab: Lab, seed: int):
        self.lab = lab
        self.rng = random.Random(seed)
        self.events = collections.Counter()
        self.runs = self.starts = self.submissions = 0

    def _say(self, name: str, what: str) -> None:
        status = read_status(self.lab.folder / name)
        phase = status.get("ranks", {}).get(0, {}).get("phase")
        where = f"{status.get('state')}, {phase}, iteration {status.get('iteration')}"
        print(f"{time.strftime('%H:%M:%S')} {name}: {what} ({where})", flush=True)

    def _disturb(self, name: str, job, most: int, until: float) -> int:
        """Disturbs a job at random moments until it ends; returns the number of disturbances."""
        for number in range(most):
            end = min(until, time.monotonic() + self.rng.uniform(0, 30))
            while time.monotonic() < end:
                if self.lab.slurm_state(job) in OVER:
                    return number
                time.sleep(0.2)
            if end == until:
                return number
            event = self.rng.choice(list(EVENTS))
            self._say(name, event)
            EVENTS[event](self.lab, job, self.rng)
            self.events[event] += 1
        return most

    def run(self, until: float) -> tuple[str, int]:
        """Disturbs a run until the time ``until`` at most; returns its name and size."""
        nodes, tasks = self.rng.choice(SHAPES)
        name = f"run{self.runs}"
        left = self.rng.randrange(1, MOST + 1)
        state, resume = "", ()
        while state != "COMPLETED":
            job = self.lab.job(name, *OPTIONS, *resume, faults=FAULTS, max_requeues=1000)
            job = self.lab.submit(job, nodes=nodes, tasks=tasks)
            self.submissions += 1
            left -= self._disturb(name, job, left, until)
            state = self.lab.until_over(job)
            status = read_status(self.lab.folder / name)
            reason = (status.get("failure") or status.get("exit") or {}).get("reason", "")
            self._say(name, f"{state} {reason}")
            resume = ("--resume",)
        self.starts += len(starts_of(self.lab.folder / name))
        self.runs += 1
        return name, nodes * tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if reason := why_no_slurm():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        root = make_coco(Path(folder, "datasets"))
        runs, alone = Path(folder, "runs"), Path(folder, "alone")
        for each in (runs, alone):
            each.mkdir()
        references = {
            size: run_here(alone / str(size), root, *OPTIONS, processes=size) for size in (1, 2)
        }
        with running_lab(root, runs) as lab:
            soak = Soak(lab, args.seed)
            until = time.monotonic() + 60 * args.minutes
            while time.monotonic() < until:
                name, size = soak.run(until)
                same_training(runs / name, references[size])
    print(
        f"seed {args.seed}: {soak.runs} runs in {soak.submissions} submissions and {soak.starts} "
        f"starts ended as if undisturbed; {dict(soak.events)}"
    )


if __name__ == "__main__":
    main()
