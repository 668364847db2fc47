"""The one exception that stands for a mistake of the user's, not of ours."""

__all__ = ["UserError"]


class UserError(Exception):
    """A mistake that the user can mend.

    Its message is one line that names what is wrong, where, and what to do. The entry points print
    it without a traceback and exit with status 1.
    """
