"""Paths as users write them in config files: with ``~`` and environment variables."""

from __future__ import annotations

import os
import re

from contnet.config.nodes import config_error

__all__ = ["expand_path"]

# $$, $NAME, ${NAME}, and a brace that nothing closes.
_SIGN = re.compile(r"\$(?:(?P<sign>\$)|(?P<name>[A-Za-z_]\w*)|\{(?P<braced>\w+)\}|(?P<open>\{))")


def expand_path(path: str, key: str) -> str:
    """A path with its environment variables and its home folder written out.

    ``$$`` stands for a dollar sign, as does one that no name follows; a URL stays as it is. So does
    the path of a file that exists, if a variable of that name does not: what a run's config.yaml
    holds can be read again.

    Args:
        path: with ``$NAME``, ``${NAME}``, ``~`` or ``~user``.
        key: what it is the value of, for messages.

    Raises:
        UserError: for a variable that is not set or empty, an unknown user, or a NUL.
    """
    if "\0" in path:
        raise config_error(f"{key} is {path!r}, which is no path")

    def value(match: re.Match) -> str:
        if match["sign"]:
            return "$"
        name = match["name"] or match["braced"]
        if name is None:
            raise config_error(f"{key} is {path!r}: a variable is written ${{NAME}} or $NAME")
        if not os.environ.get(name):
            raise config_error(
                f"{key} is {path!r}, but the environment variable {name} is not set: set it, or "
                "write $$ for a dollar sign"
            )
        return os.environ[name]

    names = [match["name"] or match["braced"] for match in _SIGN.finditer(path)]
    unknown = [name for name in names if name and not os.environ.get(name)]
    if "://" in path or (unknown and os.path.exists(path)):
        return path
    expanded = os.path.expanduser(_SIGN.sub(value, path))
    if expanded.startswith("~") and not os.path.exists(expanded):
        user = expanded.partition("/")[0]
        raise config_error(f"{key} is {path!r}, but there is no user {user[1:]}: write ./{user}")
    return expanded
