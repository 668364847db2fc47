"""Protects terminals and log files from control characters in text from elsewhere."""

from __future__ import annotations

import copy
import io
import logging
import re
import sys

from contnet.utils.text import printable_lines

__all__ = ["SafeFormatter", "protect_handler", "protect_streams"]

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# A line within a record that looks like the start of another one.
_START = re.compile(r"\n(?=\[\d\d/\d\d \d\d:\d\d:\d\d)")


def _safe(text: str) -> str:
    return _START.sub(r"\\n", printable_lines(_COLOUR.sub("", text)))


class SafeFormatter(logging.Formatter):
    """Formats like another formatter, with messages and tracebacks as in ``printable_lines``.

    The colours of the other formatter are kept on a terminal; those in messages are removed.

    Args:
        formatter: the other formatter.
        colours: whether the lines go to a terminal.
    """

    def __init__(self, formatter: logging.Formatter, colours: bool = False):
        super().__init__()
        self.formatter = formatter
        self.colours = colours

    def format(self, record: logging.LogRecord) -> str:
        """Returns the text of a record."""
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
    """Sets a :class:`SafeFormatter` for a stream handler; escapes what its encoding lacks."""
    if isinstance(handler, logging.StreamHandler):
        _protect(handler.stream)
        handler.setFormatter(SafeFormatter(handler.formatter, handler.stream.isatty()))


def protect_streams() -> None:
    """Protects this process's output, and what is logged before loggers are set up."""
    for stream in (sys.stdout, sys.stderr):
        _protect(stream)
    logging.lastResort.setFormatter(SafeFormatter(logging.Formatter()))
