"""Training runs that are disturbed at chosen or random moments, and compared with undisturbed runs.

Each run is a real process that runs train_net.py's ``main`` (tests/faults/forks.py), or a job of
tools/submit.py.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from conftest import REPOSITORY, SMALL, metrics_of
from equality import equal
from events import FULL_DISK, STARTING, Event, damage, move_clock, small_disk
from forks import ForkServer

from contnet.checkpoint.names import LAST_CHECKPOINT, iteration_of, last_checkpoint
from contnet.slurm.attempt_folder import last_saved_iteration
from contnet.slurm.records import last_submission
from contnet.slurm.status import read_status
from contnet.utils.files import SET_ASIDE

__all__ = ["KINDS", "LEAF", "Lab", "members"]

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
# Evaluations after iterations 4, 9 and 11, checkpoints after 2, 5, 8 and 11.
OPTIONS = """
SOLVER.MAX_ITER 12 SOLVER.CHECKPOINT_PERIOD 3 TEST.EVAL_PERIOD 5 LOG_PERIOD 1 SOLVER.STEPS (8,)
SOLVER.IMS_PER_BATCH 4 SOLVER.GRAD_ACCUM_STEPS 2 SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.9
SOLVER.BASE_LR 0.0001 DATALOADER.NUM_WORKERS 2 MODEL.CONTNET.DROP_PATH_RATE 0.2
MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 TEST.DETECTIONS_PER_IMAGE 1000
"""
# Kinds of starting a run, with the number of processes.
KINDS = {"one process": 1, "two processes": 2, "submitted": 1}
# The last such line in the log shows the phase of a training.
PHASES = {
    "training": re.compile(r" iter: (\d+) "),
    "saving": re.compile("Saving checkpoint to"),
    "evaluating": re.compile("Start inference on"),
}
# Errors raised while Python forks a process are printed and dropped, including PyTorch's error for
# a killed loader worker; the training fails at its next step.
DROPPED = re.compile(r"^Exception ignored in.*\nTraceback.*\n(?:[ \t].*\n|\n)*.*\n", re.MULTILINE)
# Seconds after a kill or signal within which all processes of a run must be gone.
PATIENCE = 90


# --- processes -----------------------------------------------------------------------------------


def members(session: int) -> list[int]:
    """Lists the living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def _send(pids: Sequence[int], name: str) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, getattr(signal, name))


# --- checks --------------------------------------------------------------------------------------


def _state(file: Path) -> dict:
    """Loads a checkpoint without its metadata, because the folder is different."""
    content = torch.load(file)
    del content["contnet"]
    return content


def same_run(run: Path, reference: Path) -> None:
    """Checks that two runs are bit for bit equal."""
    for name in ("model_final.pth", "model_best.pth"):
        assert equal(_state(run / name), _state(reference / name)), f"{run}: {name} differs"
    # As text, because nan does not equal itself.
    ours, theirs = (list(map(repr, metrics_of(folder))) for folder in (run, reference))
    assert ours == theirs, f"{run}: metrics.json differs"
    ours, theirs = ((folder / "results.json").read_text() for folder in (run, reference))
    assert ours == theirs, f"{run}: results.json differs"


def _check_readable(folder: Path, damaged: int) -> None:
    """Checks that the last checkpoint exists and is complete, unless it was damaged by the test."""
    if not (folder / LAST_CHECKPOINT).exists():
        return
    path = last_checkpoint(folder)
    if path.stat().st_ino != damaged:
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None, f"{path} is damaged"


class Run:
    """A training run that is disturbed until it has finished.

    Args:
        folder: folder of the run.
        kind: one of ``KINDS``.
        disk: small file system with the folder; None for a usual one.
        rng: chooses the places of damage.
        server: starts the run.
    """

    def __init__(
        self, folder: Path, kind: str, disk: Path | None, rng: random.Random, server: ForkServer
    ):
        self.folder, self.kind, self.disk, self.rng, self.server = folder, kind, disk, rng, server
        self.output = folder.with_suffix(".out")
        self.log = folder / "log.txt"
        self.tally = Counter()
        self.process = None
        self._read = 0  # bytes of the log before this start
        self._damaged = 0  # inode of the damaged file

    # Methods that depend on the kind.

    def _start(self) -> None:
        argv = ["--config-file", LEAF, *SMALL, *OPTIONS.split(), "OUTPUT_DIR", str(self.folder)]
        argv += self._resume()
        self._read = self.log.stat().st_size if self.log.exists() else 0
        self.output.write_bytes(b"")
        if self.kind == "submitted":
            submit = [sys.executable, str(REPOSITORY / "tools" / "submit.py"), "--watch"]
            options = ["--cluster", "local", "--no-snapshot", "--signal-delay", "30"]
            with open(self.output, "ab") as file:
                self.process = subprocess.Popen(
                    [*submit, *argv, *options], stdout=file, stderr=file, start_new_session=True
                )
        else:
            argv += ["--num-gpus", str(KINDS[self.kind])]
            self.process = self.server.start(argv, self.output)
        self.tally["starts"] += 1

    def _targets(self, event: Event) -> list[int]:
        """Returns the processes that an event's signal reaches."""
        if self.kind == "submitted":
            ranks = read_status(self.folder).get("ranks", {}) if self.folder.exists() else {}
            return [rank["pid"] for rank in ranks.values()]
        everyone = members(self.process.pid)
        if event.everyone or event.phase == STARTING:
            return everyone
        if event.what == "SIGKILL":
            return [self.rng.choice(everyone)] if everyone else []
        return [self.process.pid]

    def _resume(self) -> list[str]:
        numbered = [p for p in self.folder.glob("model_*.pth") if iteration_of(p.stem) is not None]
        if numbered and not (self.folder / LAST_CHECKPOINT).exists():
            # Killed after the first checkpoint was written, and before last_checkpoint.
            return ["--resume-from", str(max(numbered))]
        return ["--resume"]

    def _sessions(self) -> list[int]:
        if self.kind != "submitted":
            return [self.process.pid]
        with contextlib.suppress(Exception):  # not submitted yet
            return [int(last_submission(self.folder)["job_id"])]
        return []

    # Common methods.

    def _news(self) -> str:
        if not self.log.exists():
            return ""
        with open(self.log, errors="replace") as file:
            file.seek(self._read)
            return file.read()

    def phase(self) -> str:
        """Returns the phase of the training, from its log."""
        news = self._news()
        last = {name: [m.start() for m in p.finditer(news)][-1:] for name, p in PHASES.items()}
        return max(PHASES, key=lambda name: last[name]) if any(last.values()) else STARTING

    def _reached(self, event: Event) -> bool:
        if event.phase == STARTING:
            return True
        return len(PHASES[event.phase].findall(self._news())) >= event.count

    def _disturb(self, event: Event) -> str:
        """Waits and disturbs; returns the phase, or "" if the run ended before."""
        while not (self._reached(event) and self._targets(event)):
            if self.process.poll() is not None:
                return ""
            time.sleep(0.005)
        time.sleep(event.delay * (3 if event.phase == STARTING else 1))
        targets = self._targets(event)
        if self.process.poll() is not None or not targets:
            return ""
        phase = self.phase()
        if event.what == FULL_DISK:
            self._fill_disk()
        else:
            _send(targets, event.what)
        self.tally[f"{event.what}, {phase}"] += 1
        return phase

    def _fill_disk(self) -> None:
        room = os.statvfs(self.disk)
        left = self.rng.randrange(70 * 2**20)  # less or more than a checkpoint
        size = max(room.f_bavail * room.f_frsize - left, 1)
        with open(self.disk / "ballast", "wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, size)

    def _wait(self, patience: float = 600) -> int:
        """Waits until no process of the run is left; returns the exit status."""
        until = time.monotonic() + patience
        while self.process.poll() is None or any(map(members, self._sessions())):
            if time.monotonic() > until:
                left = [str(pid) for session in self._sessions() for pid in members(session)]
                of = ",".join([*left, str(self.process.pid)])
                listed = subprocess.run(
                    ["ps", "-o", "pid,ppid,stat,wchan:20,etimes,args", "-p", of],
                    capture_output=True,
                    text=True,
                ).stdout
                raise AssertionError(f"{self.folder}: did not end in {patience} s:\n{listed}")
            time.sleep(0.02)
        return self.process.poll()

    def _check_end(self, event: Event | None, phase: str, status: int, done: int) -> None:
        """Checks how a start of the training ended."""
        output = DROPPED.sub("", self.output.read_text(errors="replace"))
        said = f"{self.folder}: {event} ended with {status}\n{output[-3000:]}"
        assert "Traceback (most recent call last)" not in output, said
        if event is None or not phase or self.kind == "submitted":
            assert status == 0 or (event and phase), said
        elif event.what == FULL_DISK:
            lines = [line for line in output.splitlines() if line.startswith("error: ")]
            assert status == 0 or (status == 1 and len(lines) == 1 and "free" in lines[0]), said
        elif event.what != "SIGKILL":
            number = getattr(signal, event.what)
            # Before there are handlers, the kernel ends the process; a shell also returns 128 + n.
            early = [-number] if phase == STARTING else []
            assert status in [0, 128 + number, *early], said
            assert last_saved_iteration(self.folder) >= done, said

    def _iterations_done(self) -> int:
        """Returns the last iteration of this start in its log; -1 before the first one."""
        return max(map(int, PHASES["training"].findall(self._news())), default=-1)

    def _between(self, event: Event) -> None:
        """Damages the folder before the next start."""
        if not self.folder.exists():
            return
        _check_readable(self.folder, self._damaged)
        numbered = sorted(p for p in self.folder.glob("model_0*.pth"))
        if event.damage and len(numbered) > 1 and not (self.folder / "model_final.pth").exists():
            path = last_checkpoint(self.folder)
            damage(path, event.damage, self.rng)
            self._damaged = path.stat().st_ino
            self.tally[f"damaged, {event.damage}"] += 1
        if event.clock:
            move_clock(self.folder, event.clock)
            self.tally["clock moved"] += 1

    def go(self, events: Sequence[Event]) -> None:
        """Starts and disturbs the training once per event, then lets it finish."""
        for event in [*events, None]:
            self._start()
            phase, done = "", -1
            if event is not None:
                phase = self._disturb(event)
                done = self._iterations_done() if phase else -1
            # After an attempt ended by a signal, the job may start another one.
            status = self._wait(PATIENCE if phase and self.kind != "submitted" else 600)
            self._check_end(event, phase, status, done)
            if self.disk:
                (self.disk / "ballast").unlink(missing_ok=True)
            self._count_set_aside()
            if event is None or (status == 0 and not phase):
                break
            self._between(event)

    def _count_set_aside(self) -> None:
        """Counts and removes files that were set aside, which would fill a small disk."""
        for path in (self.folder / SET_ASIDE).glob("*.pth"):
            self.tally["set aside"] += 1
            path.unlink()

    def end(self) -> None:
        """Kills all processes, also after an error."""
        for session in self._sessions() if self.process else ():
            _send(members(session), "SIGKILL")


class Lab:
    """Runs disturbed trainings.

    Args:
        folder: folder for the runs.
        datasets: a DETECTRON2_DATASETS with a tiny COCO.
    """

    def __init__(self, folder: Path, datasets: Path):
        self.folder = folder
        os.environ.update(DETECTRON2_DATASETS=str(datasets), OMP_NUM_THREADS="1")
        self.server = ForkServer()
        self.references: dict[int, Path] = {}

    def reference(self, processes: int) -> Path:
        """Returns an undisturbed run with this number of processes."""
        if processes not in self.references:
            kind = next(name for name, number in KINDS.items() if number == processes)
            run = Run(
                self.folder / f"undisturbed{processes}", kind, None, random.Random(0), self.server
            )
            run.go([])
            self.references[processes] = run.folder
        return self.references[processes]

    def run(
        self, name: str, kind: str, events: Sequence[Event], seed: object = 0, disk: bool = False
    ) -> Counter:
        """Disturbs a run and compares it with an undisturbed one; returns the counted events.

        Raises:
            AssertionError: if a check fails; the folder of the run is kept.
        """
        reference = self.reference(KINDS[kind])
        place = self.folder / f"{name}_disk"
        with small_disk(place) if disk else contextlib.nullcontext():
            folder = (place if disk else self.folder) / name
            rng = random.Random(f"{seed} {name}")
            run = Run(folder, kind, place if disk else None, rng, self.server)
            try:
                run.go(events)
                same_run(folder, reference)
            except BaseException:
                print(f"events so far: {dict(run.tally)}; of the run: {list(events)}")
                raise
            finally:
                run.end()
        return run.tally
