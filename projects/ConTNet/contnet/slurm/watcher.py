"""The thread that watches over a rank of a job: signals, heartbeat, hangs, other ranks, lease."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from contnet.launch.run_lease import LeaseLost
from contnet.slurm.attempt_folder import AttemptFolder
from contnet.slurm.cluster import Job
from contnet.slurm.lease import Lease
from contnet.utils.errors import UserError, message_of
from contnet.utils.failures import lost_contact
from contnet.utils.processes import process_start
from contnet.utils.records import warn_once
from contnet.utils.signals import Listener, end_children

__all__ = ["SIGNALS", "Watcher"]

logger = logging.getLogger(__name__)

# What SLURM sends ahead of the end, and what it sends at the end.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)

# How long a rank waits for its own end after another one's, in seconds.
_LINGER = 10.0

# Exit status of a process that a later attempt has replaced.
_REPLACED = 3


def _where_main_is() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident)
    if frame is None:
        return "nowhere"
    last = traceback.extract_stack(frame, limit=1)[0]
    return f"{last.name}, {last.filename}:{last.lineno}"


class Watcher(Listener):
    """Watches over this process until it ends.

    Args:
        job: this attempt of the job.
        folder: of this attempt.
        lease: of the run.
        hang_timeout: seconds without progress after which the job is given up.
        grace: seconds after a signal in which the training loop must have left.
        heartbeat_interval: seconds between two heartbeats.
        abandon: called on rank 0 if a signal came and the training loop cannot be waited for, with
            the reason; writes the note ``exit`` and returns the exit status.

    Attributes:
        signals: those that have come, oldest first.
        phase: "starting", "training", "evaluation", "preempting" or "ended".
        iteration: the last one done, -1 before.
        first_iteration: the last one that an earlier attempt had done.
        max_iter: their number, 0 before it is known.
    """

    def __init__(
        self,
        job: Job,
        folder: AttemptFolder,
        lease: Lease,
        hang_timeout: float,
        grace: float,
        heartbeat_interval: float,
        abandon: Callable[[str], int],
    ):
        super().__init__("contnet-watcher", SIGNALS)
        self.job = job
        self.folder = folder
        self.lease = lease
        self.hang_timeout = hang_timeout
        self.grace = grace
        self.heartbeat_interval = heartbeat_interval
        self.abandon = abandon
        self.signals: list[str] = []
        self.phase = "starting"
        self.iteration = self.first_iteration = -1
        self.max_iter = 0
        self.ended = None
        self._deadline = float("inf")
        self._moved = time.monotonic()
        self._failure_seen = None

    def start(self) -> None:
        """From the main thread: takes over the signals, those that wait already too."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        # Open to the end: it is written when nothing else can be done.
        self._stacks = self.folder.rank_file(self.job.rank, ".stack").open("w")
        # Also what a compiled library ends, such as NCCL's watchdog by SIGABRT.
        faulthandler.enable(file=self._stacks)
        super().start()
        for number in SIGNALS:
            signal.siginterrupt(number, False)

    # What the main thread says.

    def progress(self, iteration: int | None = None) -> None:
        """That something has been done, and, between two iterations, which one."""
        self._moved = time.monotonic()
        if iteration is not None:
            self.iteration = iteration

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.progress()
        self.wake()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """While all there is to lose is an evaluation, a signal is answered at once."""
        self.enter("evaluation")
        try:
            yield
        finally:
            self.enter("training")

    def finish(self, how: str) -> None:
        """The last word of this rank: "finished", "preempted" or "failed"."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        end_children()
        self.ended = how
        self.enter("ended")
        with contextlib.suppress(OSError):  # the disk is full perhaps, which has been said
            self.folder.write_heartbeat(self._record())
        # Should the interpreter not get to its end, for threads or processes that do not.
        faulthandler.dump_traceback_later(6 * _LINGER, exit=True, file=self._stacks)

    def fail(self, error: BaseException) -> None:
        """Notes what ended this rank, and the job unless another rank has failed before."""
        lost, rank = lost_contact(error), None
        if isinstance(error, UserError):
            rank = error.rank
            kind, text = UserError, [message_of(error).removeprefix(f"rank {rank}: ")]
        else:
            kind, text = type(error), str(error).strip().splitlines()
        self._record_failure(
            f"{kind.__name__}: {text[0] if text else '(no message)'}",
            details="".join(traceback.format_exception(error))[-8000:],
            lost=lost,
            rank=rank,
        )
        self.finish("failed")

    def _record_failure(
        self, reason: str, details: str, lost: bool = False, rank: int | None = None
    ) -> None:
        record = {
            "rank": self.job.rank if rank is None else rank,
            "iteration": self.iteration,
            "phase": self.phase,
            "reason": reason,
            "details": details,
            "lost": lost,
        }
        try:
            first = self.folder.note("failure", record)
        except OSError as error:
            logger.error(f"The job's folder {self.folder.path} cannot be written: {error}")
            first = True
        if first:
            logger.error(f"The job ends: {reason}")

    # What the thread does.

    def run(self) -> None:
        while self.ended is None:
            try:
                self._look()
            except LeaseLost:
                self.end_replaced()
            except OSError as error:  # a shared folder may fail for a while
                warn_once(f"The job's folder {self.folder.path}: {error}")
            for number in self.listen(self.heartbeat_interval):
                self._take(signal.Signals(number).name)

    def _take(self, name: str) -> None:
        first = not self.signals
        self.signals.append(name)
        if first:
            logger.warning(
                f"{name} after iteration {self.iteration} ({self.phase}): the job will save and "
                "exit"
            )
            self._deadline = time.monotonic() + self.grace
            with contextlib.suppress(OSError):
                self.folder.note("signalled", {"rank": self.job.rank, "signal": name})

    def _record(self) -> dict:
        return {
            "rank": self.job.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": self.phase,
            "iteration": self.iteration,
            "max_iter": self.max_iter,
            "signals": self.signals,
            "heartbeat_interval": self.heartbeat_interval,
            "ended": self.ended,
        }

    def _look(self) -> None:
        self.lease.check()
        if self.ended is not None:
            return
        # If this thread cannot run, for a call that keeps the interpreter, this still does.
        patience = self.hang_timeout + 2 * self.heartbeat_interval
        faulthandler.dump_traceback_later(patience, exit=True, file=self._stacks)
        self.folder.write_heartbeat(self._record())
        self._look_at_others()
        self._look_at_progress()
        if not self.signals and (note := self.folder.read("signalled")):
            self._take(note["signal"])
        # Where there is no SLURM that would end the other ranks, at any time.
        if (
            "SIGTERM" in self.signals or self.job.cluster == "local"
        ) and self.phase != "preempting":
            self._look_for_killed()
        if self.signals:
            self._answer_signal()

    def end_replaced(self) -> NoReturn:
        """Ends this process at once, for a later attempt owns the run; from any thread."""
        self.lease.remove_unfinished()
        with contextlib.suppress(OSError, ValueError):  # the log's disk may be full
            print("a later attempt of the job owns the run: this one ends", file=sys.stderr)
            sys.stderr.flush()
        os._exit(_REPLACED)

    def dump_stacks(self) -> None:
        """Adds the stacks of all threads to ``rank-<rank>.stack``."""
        faulthandler.dump_traceback(file=self._stacks)
        self._stacks.flush()

    def _look_at_others(self) -> None:
        failure = self.folder.read("failure")
        if failure is None:
            return
        if self._failure_seen is None:
            self._failure_seen = time.monotonic()
            logger.error(f"Rank {failure['rank']} has failed: {failure['reason']}")
            self.dump_stacks()
        elif time.monotonic() - self._failure_seen > _LINGER:
            os._exit(1)

    def _look_for_killed(self) -> None:
        """SIGTERM is also what SLURM sends when another rank was killed, which cannot say so."""
        for rank, record in self.folder.ranks().items():
            if record["host"] != socket.gethostname() or record["ended"]:
                continue
            if not process_start(record["pid"]):
                self._record_failure(
                    f"rank {rank} (process {record['pid']} on {record['host']}) ended without a "
                    "message: killed, perhaps out of memory?",
                    details="",
                    rank=rank,
                )

    def _look_at_progress(self) -> None:
        still = time.monotonic() - self._moved
        if still < self.hang_timeout or self._failure_seen is not None:
            return
        self._record_failure(
            f"no progress for {still:.0f} s after iteration {self.iteration} ({self.phase}), in "
            f"{_where_main_is()}",
            details=f"stacks of all ranks: {self.folder.path}/rank-*.stack",
        )

    def _answer_signal(self) -> None:
        if self.phase == "preempting":
            return
        if self.job.rank:
            if self.folder.read("exit"):
                os._exit(0)
        elif self._only_evaluation_to_lose():
            os._exit(self.abandon("a signal came in an evaluation, which will begin again"))
        elif time.monotonic() > self._deadline:
            os._exit(self.abandon(f"{self.grace:.0f} s were not enough to save and exit"))

    def _only_evaluation_to_lose(self) -> bool:
        """Whether to leave an evaluation at once: not if this attempt has done nothing before it.

        Nor for SIGTERM alone, which also comes when another rank was killed.
        """
        advanced = self.iteration > self.first_iteration
        return self.phase == "evaluation" and advanced and "SIGUSR2" in self.signals
