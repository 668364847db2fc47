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

# Ctrl-C, the usual request to end, and a closed terminal.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_held: set[int] = set()  # signals that forked children block
_outliving = False  # whether children that are forked now block SIGTERM, too
_forking = False
_parent = 0  # the process that forks, if its main thread forks

_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>


class Interrupted(KeyboardInterrupt):
    """A signal ends this process.

    Args:
        number: number of the signal; the exit status is 128 more.
        message: message for stderr; "" if it is in the log.
    """

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number
        self.status = 128 + number


def heeded_signals() -> list[signal.Signals]:
    """Returns the signals that end this process, except those that nohup or a shell disabled."""
    return [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def come_again(number: int) -> bool:
    """Whether a handler must not raise now; if so, sends the signal again later.

    While a process forks, Python prints and drops exceptions that are raised in its fork callbacks.
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
    # For the kernel, the parent ends when the thread that forked ends.
    _parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0


def _end_fork() -> None:
    global _forking
    _forking = False


def _begin_child() -> None:
    # Otherwise PyTorch's loader workers would not notice the parent's end while they start, and
    # those of a pool never.
    if _parent:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _parent:
            os._exit(1)
    held = set(_held)
    if signal.SIGTERM in held and not _outliving:  # with which pools end their processes
        held.remove(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    _end_fork()


def _set_up_children(numbers: Sequence[int]) -> None:
    """Makes children that are forked later end with this process, and block these signals."""
    # Each time, because the latest callbacks run first before a fork, and last after it.
    os.register_at_fork(before=_begin_fork, after_in_parent=_end_fork, after_in_child=_begin_child)
    _held.update(numbers)


@contextlib.contextmanager
def outliving_signals() -> Iterator[None]:
    """Context for starting loader workers, which a training still needs to save after a signal.

    They block SIGTERM; other children do not. All children block the other signals, which reach a
    whole process group. :func:`end_children` ends all of them.
    """
    global _outliving
    before, _outliving = _outliving, True
    try:
        yield
    finally:
        _outliving = before


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Context in which signals raise :class:`Interrupted` in the main thread; children continue."""
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
    """Kills the remaining child processes, which block the signals that would end them.

    Called in the main thread, when the children are no longer needed.
    """
    # PyTorch's handler raises an error if a loader worker is killed.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in _kill_children():
        child.join(5)  # a child that waits for a dead file system may not end
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def end_now(status: int) -> NoReturn:
    """Ends this process and its children at once, from any thread."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    _kill_children()
    os._exit(status)


class Listener(threading.Thread):
    """A thread that receives signals at once.

    Python runs signal handlers in the main thread between two of its instructions, so a process
    that waits in a collective would handle a signal late or never. This thread receives it through
    the file descriptor to which the interpreter writes the number of each signal.

    Args:
        name: name of the thread.
        numbers: the signals.

    Attributes:
        left: whether the thread should end.
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
        """Starts the thread and takes over signals, also pending ones; for the main thread."""
        signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self.handle) for number in self.numbers}
        super().start()
        _set_up_children(self.numbers)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.numbers)

    def stop(self) -> None:
        """Restores the signal handlers and asks the thread to end; for the main thread."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.left = True
        self.wake()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal in the main thread: only prevents it from killing the process."""

    def wake(self) -> None:
        """Ends the wait of :meth:`listen`."""
        with contextlib.suppress(BlockingIOError):
            self._outbox.send(b"\0")

    def listen(self, seconds: float) -> list[int]:
        """Waits at most this long for signals and returns their numbers; for the thread."""
        if not select.select([self._inbox], [], [], seconds)[0]:
            return []
        return [number for number in self._inbox.recv(4096) if number in self.numbers]
