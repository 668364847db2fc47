"""Saves a checkpoint before a signal ends a training, on all ranks after the same iteration."""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist
from detectron2.utils import comm

from contnet.checkpoint.names import numbered_name
from contnet.engine.hooks import LauncherHook, is_due
from contnet.utils.signals import Interrupted, Listener, come_again, end_now, heeded_signals

__all__ = ["Interruption", "SaveOnSignal", "SavingHook"]

logger = logging.getLogger(__name__)

# Timeouts in seconds: from a signal to the checkpoint, and for the exit once nothing is left to
# save.
_PATIENCE = 120.0
_LINGER = 10.0
# Seconds within which a second signal counts as the first one, which may reach a process twice:
# directly and through its group.
_DOUBLE = 1.0


class _Vote:
    """Shares a signal among all ranks: sent after an iteration, read after the next one.

    Therefore no rank waits, and all ranks get the same answer. With a single process, the answer
    is immediate.
    """

    def __init__(self):
        self.group = None
        if comm.get_world_size() > 1:
            # On the CPU, so that no rank waits for its GPU.
            self.group = dist.new_group(backend="gloo")
        self.ballot = torch.zeros(1, dtype=torch.int32)
        self.work = None

    def answer(self, number: int) -> int:
        if self.group is None:
            return number
        if self.work is not None:
            self.work.wait()
            self.work = None
        return int(self.ballot.item())

    def ask(self, number: int) -> None:
        if self.group is not None:
            self.ballot.fill_(number)
            self.work = dist.all_reduce(
                self.ballot, dist.ReduceOp.MAX, group=self.group, async_op=True
            )


class SavingHook(LauncherHook):
    """Saves and leaves the training loop on all ranks when one of them receives a signal.

    At least one iteration runs first.
    """

    def __init__(self):
        self.vote = _Vote()
        self._saved = -1

    def signalled(self) -> int:
        """Returns the number of the signal that this process has received; 0 for none."""
        raise NotImplementedError

    def leave(self, number: int) -> NoReturn:
        """Leaves the training loop, once the checkpoint is on the disk.

        Args:
            number: number of the signal.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        trainer = self.trainer
        number = self.vote.answer(self.signalled())
        if trainer.iter + 1 == trainer.max_iter:
            return
        if number:
            self.save()
            trainer.checkpointer.wait()
            self.leave(number)
        self.vote.ask(self.signalled())

    def save(self) -> None:
        """Saves a checkpoint after this iteration, unless there is one already."""
        trainer = self.trainer
        due = is_due(trainer.iter, trainer.cfg.SOLVER.CHECKPOINT_PERIOD, trainer.max_iter)
        if not due and self._saved != trainer.iter:
            trainer.checkpointer.save(numbered_name(trainer.iter), iteration=trainer.iter)
            self._saved = trainer.iter


class Interruption(Listener):
    """Context that handles the signals that end a process.

    After the first signal, a training saves a checkpoint. If there is nothing to save, the signal
    is raised in the main thread, which then has some seconds to exit. A second signal ends the
    process at once, and so does the end of the process that spawned this one. A spawned rank does
    not count signals, because it receives those from a terminal twice.

    Attributes:
        number: number of the first signal, 0 before that.
        saving: whether the training loop will save and leave.
    """

    def __init__(self):
        super().__init__("contnet-signals", heeded_signals())
        self.number = 0
        self.saving = False
        self._parent = multiprocessing.parent_process()
        self._first = self._deadline = math.inf

    @property
    def is_spawned(self) -> bool:
        """Whether another process has spawned this one, and monitors it."""
        return self._parent is not None

    def __enter__(self) -> Interruption:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.number:  # the thread ends the process if it does not exit
            self.end_soon()
            return
        self.stop()

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if not self.saving and not come_again(number):
            self.interrupt()

    def interrupt(self) -> NoReturn:
        """Raises :class:`Interrupted` for the first signal; called if there is nothing to save."""
        told = self.is_spawned or comm.get_rank() > 0
        name = signal.Signals(self.number).name
        raise Interrupted(self.number, "" if told else f"ended by {name}")

    def take_time(self) -> None:
        """Removes the timeout while a checkpoint is written."""
        self._first = min(self._first, time.monotonic())  # the thread may not have read it
        self._deadline = math.inf

    def end_soon(self) -> None:
        """Ignores further signals and starts the timeout for the exit; called once all is saved."""
        for number in self.numbers:
            signal.signal(number, signal.SIG_IGN)
        self.saving = False
        self._deadline = time.monotonic() + _LINGER

    def run(self) -> None:
        while not self.left:
            if self._parent is not None and os.getppid() != self._parent.pid:
                end_now(1)
            if time.monotonic() > self._deadline:
                end_now(128 + self.number)
            for number in self.listen(1.0):
                self._hear(number)

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if self._first == math.inf:
            self._first = now
            self._deadline = now + (_PATIENCE if self.saving else _LINGER)
            if self.saving and not self.is_spawned:
                logger.warning(
                    f"{signal.Signals(number).name}: the training saves a checkpoint and exits; a "
                    "second signal ends it at once"
                )
        elif not self.is_spawned and now - self._first > _DOUBLE:
            end_now(128 + number)


class SaveOnSignal(SavingHook):
    """Saves and exits with the signal's status; exits at once during an evaluation.

    Args:
        listener: the :class:`Interruption` of this process.
    """

    def __init__(self, listener: Interruption):
        super().__init__()
        self.listener = listener

    def before_train(self) -> None:
        self.listener.saving = True

    def after_train(self) -> None:
        self.listener.saving = False

    def signalled(self) -> int:
        return self.listener.number

    def save(self) -> None:
        self.listener.take_time()
        super().save()

    def leave(self, number: int) -> NoReturn:
        comm.synchronize()  # when one process exits, the others are ended
        self.listener.number = number
        self.listener.end_soon()
        iteration, folder = self.trainer.iter, self.trainer.cfg.OUTPUT_DIR
        logger.warning(
            f"Ended by {signal.Signals(number).name}, saved after iteration {iteration} in "
            f"{folder}: resume with the same command and --resume"
        )
        raise Interrupted(number)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.listener.saving = False  # the checkpoint is saved before
        if self.listener.number:
            self.listener.interrupt()
        yield
        self.listener.saving = True
