"""The one exception that stands for a mistake of the user's, not of ours."""

import sys

__all__ = ["UserError", "print_error"]


class UserError(Exception):
    """A mistake that the user can mend.

    Its message is one line that names what is wrong, where, and what to do. The entry points print
    it without a traceback and exit with status 1.
    """


def print_error(error: UserError) -> None:
    """Says what is wrong, in one line on the error stream."""
    # PyTorch puts a loader worker's traceback before the message.
    line = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2]
    print(f"error: {line.strip()}", file=sys.stderr, flush=True)
