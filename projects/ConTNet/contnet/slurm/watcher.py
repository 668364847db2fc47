"""The thread that watches a rank of a job: signals, heartbeat, hangs, other ranks, lease."""

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

# What SLURM sends before the time limit, and what it sends at the end.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)

# Seconds that a rank gets to end by itself after a rank has failed.
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
    """Watches this process until it ends.

    Args:
        job: this attempt of the job.
        folder: folder of this attempt.
        lease: lease of the run.
        hang_timeout: seconds without progress after which the job fails.
        grace: seconds after a signal within which the training loop must end.
        heartbeat_interval: seconds between two heartbeats.
        abandon: called on rank 0, with the reason, if a signal came and the training loop cannot be
            waited for; writes the note ``exit`` and returns the exit status.

    Attributes:
        signals: names of the received signals, oldest first.
        phase: "starting", "training", "evaluation", "preempting" or "ended".
        iteration: last completed iteration, -1 before the first.
        first_iteration: last iteration of the earlier attempts, -1 if none.
        max_iter: number of iterations, 0 before it is known.
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
        """Starts the thread and takes over signals, also pending ones; for the main thread."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        # Kept open: it is written when nothing else is possible any more.
        self._stacks = self.folder.rank_file(self.job.rank, ".stack").open("w")
        # Also for crashes in compiled libraries, such as a SIGABRT by NCCL's watchdog.
        faulthandler.enable(file=self._stacks)
        super().start()
        for number in SIGNALS:
            signal.siginterrupt(number, False)

    # Called in the main thread.

    def progress(self, iteration: int | None = None) -> None:
        """Records progress and, between two iterations, the last completed one."""
        self._moved = time.monotonic()
        if iteration is not None:
            self.iteration = iteration

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.progress()
        self.wake()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context of an evaluation, in which a signal may end the process at once."""
        self.enter("evaluation")
        try:
            yield
        finally:
            self.enter("training")

    def finish(self, how: str) -> None:
        """Records how this rank ends: "finished", "preempted" or "failed"; then ignores signals."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        end_children()
        self.ended = how
        self.enter("ended")
        with contextlib.suppress(OSError):  # perhaps the disk is full, which was reported
            self.folder.write_heartbeat(self._record())
        # If threads or child processes keep the interpreter from exiting.
        faulthandler.dump_traceback_later(6 * _LINGER, exit=True, file=self._stacks)

    def fail(self, error: BaseException) -> None:
        """Records why this rank failed, as the job's failure if no rank failed before."""
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

    # Called in the watcher's thread.

    def run(self) -> None:
        while self.ended is None:
            try:
                self._look()
            except LeaseLost:
                self.end_replaced()
            except OSError as error:  # a shared folder may be unavailable for a while
                warn_once(f"The job's folder {self.folder.path} cannot be used now: {error}")
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
        # This still works if another thread holds the GIL, so that this one cannot run.
        patience = self.hang_timeout + 2 * self.heartbeat_interval
        faulthandler.dump_traceback_later(patience, exit=True, file=self._stacks)
        self.folder.write_heartbeat(self._record())
        self._look_at_others()
        self._look_at_progress()
        if not self.signals and (note := self.folder.read("signalled")):
            self._take(note["signal"])
        # Without SLURM, nothing else ends the other ranks, so it is checked at any time.
        if (
            "SIGTERM" in self.signals or self.job.cluster == "local"
        ) and self.phase != "preempting":
            self._look_for_killed()
        if self.signals:
            self._answer_signal()

    def end_replaced(self) -> NoReturn:
        """Ends this process at once, because a later attempt owns the run; for any thread."""
        self.lease.remove_unfinished()
        with contextlib.suppress(OSError, ValueError):  # the log's disk may be full
            print("a later attempt of the job owns the run: this one ends", file=sys.stderr)
            sys.stderr.flush()
        os._exit(_REPLACED)

    def dump_stacks(self) -> None:
        """Appends the stacks of all threads to ``rank-<rank>.stack``."""
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
        """Reports killed ranks on this machine: SLURM sends SIGTERM in this case, too."""
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
            os._exit(self.abandon("the signal came during an evaluation, which will be repeated"))
        elif time.monotonic() > self._deadline:
            os._exit(self.abandon(f"{self.grace:.0f} s were not enough to save and exit"))

    def _only_evaluation_to_lose(self) -> bool:
        """Whether to exit an evaluation at once: only if this attempt did iterations before it.

        Not after SIGTERM only, which SLURM also sends when another rank was killed.
        """
        advanced = self.iteration > self.first_iteration
        return self.phase == "evaluation" and advanced and "SIGUSR2" in self.signals
