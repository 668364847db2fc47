"""Runs commands: prints errors in one line, and returns the exit status."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from typing import IO

from contnet.utils.errors import UserError, print_error
from contnet.utils.logs import protect_streams
from contnet.utils.signals import end_children, interruptible

__all__ = ["EXIT_STATUSES", "run_command"]

EXIT_STATUSES = """\
exit status: 0 done, 1 failed (or found something wrong), 2 a mistake in the command line or the
config, 128 + N ended by signal N (130 Ctrl-C, 143 SIGTERM)
"""


def _has_reader(stream: IO) -> bool:
    """Whether a stream has a reader; if not, its output is discarded from now on."""
    try:
        number = stream.fileno()
    except OSError:  # not a file, but an object that replaces one
        return True
    poll = select.poll()
    poll.register(number, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return False


def _interrupted(error: KeyboardInterrupt) -> int:
    _has_reader(sys.stdout)  # the terminal may have been closed
    if _has_reader(sys.stderr) and str(error):
        print_error(UserError(str(error)))
    return getattr(error, "status", 128 + signal.SIGINT)


def run_command(function: Callable[[], int | None]) -> int:
    """Runs a command, in the main thread.

    Args:
        function: the command; returns its exit status, None for 0.

    Returns:
        The exit status, as described in ``EXIT_STATUSES``. User errors and signals print one line
        on stderr; a closed output (``| head``) is not an error.
    """
    protect_streams()
    try:
        with interruptible():
            status = function() or 0
            sys.stdout.flush()
            return status
    except UserError as error:
        print_error(error)
        return error.status
    except KeyboardInterrupt as error:
        return _interrupted(error)
    except BrokenPipeError:
        if _has_reader(sys.stdout):
            raise
        return 128 + signal.SIGPIPE
    finally:
        end_children()
