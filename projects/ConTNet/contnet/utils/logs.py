"""What goes into log files."""

from __future__ import annotations

import logging
import re

__all__ = ["WithoutColours"]

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class WithoutColours(logging.Formatter):
    """Formats as another formatter does, and takes the terminal's colour codes away.

    Args:
        formatter: the other one.
    """

    def __init__(self, formatter: logging.Formatter):
        super().__init__()
        self.formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return _COLOUR.sub("", self.formatter.format(record))
