"""Prints one line for known errors, instead of Python's and Detectron2's tracebacks."""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
import threading

from contnet.utils.errors import UserError
from contnet.utils.files import explain_os_error

__all__ = ["report_lost_lines", "shorten_tracebacks"]

_reported: set[str] = set()


def report_lost_lines(handler: logging.StreamHandler) -> None:
    """Makes a handler warn once if its stream cannot be written, and lets the run continue.

    Args:
        handler: handler of a logger; several may have the same stream.
    """
    usual = handler.handleError

    def handle(record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            usual(record)
            return
        # Closing the stream at exit would write the buffered rest, and print a traceback.
        atexit.unregister(handler.stream.close)
        name = str(getattr(handler.stream, "name", handler.stream))
        if name in _reported:
            return
        _reported.add(name)
        reason = explain_os_error(error, name)
        with contextlib.suppress(OSError):
            print(
                f"warning: {name} cannot be written ({reason}): log lines are lost",
                file=sys.stderr,
                flush=True,
            )

    handler.handleError = handle


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record is logged; UserErrors are only reported in the last line of the run."""
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))


def shorten_tracebacks() -> None:
    """Removes the tracebacks of known errors.

    The training loop logs a traceback for each error, and TensorBoard's threads print one if they
    cannot write; the next write raises the same error.
    """
    threading.excepthook = _thread_failed
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_news)
