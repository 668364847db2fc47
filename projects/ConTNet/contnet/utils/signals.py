"""Handling of signals that end a process, and their exit status."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

__all__ = [
    "Interrupted",
    "Listener",
    "come_again",
    "end_children",
    "end_now",
    "heeded_signals",
    "interruptible",
    "outliving_signals",
]

# A terminal's Ctrl-C, what ends a process politely, and a terminal that was closed.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_held: set[int] = set()  # what forked children do not hear
_outliving = False  # whether children that are forked now do not end by SIGTERM either
_forking = False
_parent = 0  # the process that forks, if its main thread does

_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


class Interrupted(KeyboardInterrupt):
    """A signal ends this process.

    Args:
        number: of the signal; the exit status is 128 more.
        message: for the error stream; "" where the log has said it.
    """

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number
        self.status = 128 + number


def heeded_signals() -> list[signal.Signals]:
    """Those that end this process; what nohup or a shell has had it ignore stays ignored."""
    return [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def come_again(number: int) -> bool:
    """Whether a handler must not raise now; the signal then comes again.

    While a process forks, Python prints what is raised in its callbacks, and drops it.
    """
    if _forking:
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
    return _forking


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not come_again(number):
        raise Interrupted(number, f"ended by {signal.Signals(number).name}")


def _begin_fork() -> None:
    global _forking, _parent
    _forking = True
    # The kernel takes the end of the thread that forks for the parent's.
    _parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0


def _end_fork() -> None:
    global _forking
    _forking = False


def _begin_child() -> None:
    # However the parent ends: PyTorch's loader workers would not notice it while they begin, those
    # of a pool never.
    if _parent:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _parent:
            os._exit(1)
    held = set(_held)
    if signal.SIGTERM in held and not _outliving:  # by which pools end their processes
        held.remove(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    _end_fork()


def _set_up_children(numbers: Sequence[int]) -> None:
    """Has children that are forked from now on end with this one, and not hear signals to all."""
    # Each time, for the last callbacks are the first before a fork, and the last after it.
    os.register_at_fork(before=_begin_fork, after_in_parent=_end_fork, after_in_child=_begin_child)
    _held.update(numbers)


@contextlib.contextmanager
def outliving_signals() -> Iterator[None]:
    """Around the start of loader workers, which a training that saves at a signal still needs.

    Other children hear SIGTERM, and none of them the other signals that reach a whole group.
    :func:`end_children` ends all.
    """
    global _outliving
    before, _outliving = _outliving, True
    try:
        yield
    finally:
        _outliving = before


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raises :class:`Interrupted` at a signal, only in the main thread; children continue."""
    numbers, held = heeded_signals(), set(_held)
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    _set_up_children(numbers)
    try:
        yield
    finally:
        _held.intersection_update(held)
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_children() -> list[multiprocessing.Process]:
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    return children


def end_children() -> None:
    """Kills the processes that this one has left running, which hear no signal of the interpreter.

    Called in the main thread, when nothing is expected of them any more.
    """
    # PyTorch's handler calls a killed loader worker an error.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in _kill_children():
        child.join(5)  # a child in a call of a dead file system may not end
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def end_now(status: int) -> NoReturn:
    """Ends this process and its children at once, from any thread."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    _kill_children()
    os._exit(status)


class Listener(threading.Thread):
    """A thread that hears of signals at once.

    Python runs signal handlers in the main thread between two of its instructions, so a process
    that waits in a collective would learn of a signal late or never. This thread learns of it
    through the file descriptor into which the interpreter writes the number of each signal.

    Args:
        name: of the thread.
        numbers: the signals.

    Attributes:
        left: whether the thread is to end.
    """

    def __init__(self, name: str, numbers: Sequence[int]):
        super().__init__(name=name, daemon=True)
        self.numbers = tuple(numbers)
        self.left = False
        self._before = {}
        self._inbox, self._outbox = socket.socketpair()
        self._inbox.setblocking(False)
        self._outbox.setblocking(False)

    def start(self) -> None:
        """From the main thread: takes over the signals, those that wait already too."""
        signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self.handle) for number in self.numbers}
        super().start()
        _set_up_children(self.numbers)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.numbers)

    def stop(self) -> None:
        """From the main thread: gives the signals back, and asks the thread to end."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.left = True
        self.wake()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler in the main thread, which only keeps the signal from killing."""

    def wake(self) -> None:
        """Ends the wait of :meth:`listen`."""
        with contextlib.suppress(BlockingIOError):
            self._outbox.send(b"\0")

    def listen(self, seconds: float) -> list[int]:
        """In the thread: waits so long at most; the numbers of the signals that have come."""
        if not select.select([self._inbox], [], [], seconds)[0]:
            return []
        return [number for number in self._inbox.recv(4096) if number in self.numbers]
