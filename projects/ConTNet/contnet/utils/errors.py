"""The exceptions that stand for a mistake of the user's, not of ours."""

import sys

from contnet.utils.addresses import redact
from contnet.utils.text import printable

__all__ = ["UsageError", "UserError", "message_of", "print_error"]

_LONGEST = 4000  # characters of a message


class UserError(Exception):
    """A mistake that the user can mend.

    Its message is one line that names what is wrong, where, and what to do. The entry points print
    it without a traceback and exit with ``status``. Passwords in addresses are left out of it.
    ``rank`` is set where it is another rank's mistake, whose number the message begins with.
    """

    status = 1
    rank: int | None = None

    def __init__(self, *args: object):
        super().__init__(*(redact(each) if isinstance(each, str) else each for each in args))


class UsageError(UserError):
    """A mistake in the command line or the config."""

    status = 2


def message_of(error: UserError) -> str:
    """The line that says what is wrong."""
    # PyTorch puts a loader worker's traceback before the message.
    kind = type(error)
    return str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()


def print_error(error: UserError) -> None:
    """Says what is wrong, in one line on the error stream."""
    print(f"error: {printable(message_of(error), _LONGEST)}", file=sys.stderr, flush=True)
