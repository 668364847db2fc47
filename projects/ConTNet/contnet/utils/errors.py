"""Exceptions for user errors."""

import sys

from contnet.utils.addresses import redact
from contnet.utils.text import printable

__all__ = ["UsageError", "UserError", "message_of", "print_error"]

_LONGEST = 4000  # characters of a message


class UserError(Exception):
    """An error that the user can fix.

    Its message is one line: what is wrong, where, and what to do. The entry points print it without
    a traceback and exit with ``status``. Passwords in addresses are removed. ``rank`` is set if
    the error is from another rank; its message starts with the rank.
    """

    status = 1
    rank: int | None = None

    def __init__(self, *args: object):
        super().__init__(*(redact(each) if isinstance(each, str) else each for each in args))


class UsageError(UserError):
    """An error in the command line or the config."""

    status = 2


def message_of(error: UserError) -> str:
    """The one-line message of an error."""
    # PyTorch puts a loader worker's traceback before the message.
    kind = type(error)
    return str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()


def print_error(error: UserError) -> None:
    """Prints an error in one line on stderr."""
    print(f"error: {printable(message_of(error), _LONGEST)}", file=sys.stderr, flush=True)
