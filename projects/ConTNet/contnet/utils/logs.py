"""What people read in terminals and log files: no text that came from elsewhere controls them."""

from __future__ import annotations

import copy
import io
import logging
import re
import sys

from contnet.utils.text import printable_lines

__all__ = ["SafeFormatter", "protect_handler", "protect_streams"]

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# A line within a record that would pass for the start of another one.
_START = re.compile(r"\n(?=\[\d\d/\d\d \d\d:\d\d:\d\d)")


def _safe(text: str) -> str:
    return _START.sub(r"\\n", printable_lines(_COLOUR.sub("", text)))


class SafeFormatter(logging.Formatter):
    """Formats as another formatter does, with messages and tracebacks as ``printable_lines``.

    The colours of the other formatter stay on a terminal; those in messages are taken away.

    Args:
        formatter: the other one.
        colours: whether the lines go to a terminal.
    """

    def __init__(self, formatter: logging.Formatter, colours: bool = False):
        super().__init__()
        self.formatter = formatter
        self.colours = colours

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record."""
        record = copy.copy(record)
        record.msg, record.args = _safe(record.getMessage()), None
        if record.exc_info:
            record.exc_text = _safe(self.formatter.formatException(record.exc_info))
        text = self.formatter.format(record)
        return text if self.colours else _COLOUR.sub("", text)


def _protect(stream: object) -> None:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def protect_handler(handler: logging.Handler) -> None:
    """Gives a handler that writes text a :class:`SafeFormatter` and an encoding that takes all."""
    if isinstance(handler, logging.StreamHandler):
        _protect(handler.stream)
        handler.setFormatter(SafeFormatter(handler.formatter, handler.stream.isatty()))


def protect_streams() -> None:
    """The same for this process's output, and for what is logged before loggers are set up."""
    for stream in (sys.stdout, sys.stderr):
        _protect(stream)
    logging.lastResort.setFormatter(SafeFormatter(logging.Formatter()))
