"""Expands ``~`` and environment variables in the paths of config files."""

from __future__ import annotations

import os
import re

from contnet.config.nodes import config_error

__all__ = ["expand_path"]

# $$, $NAME, ${NAME}, and ${ without a name or closing brace.
_SIGN = re.compile(r"\$(?:(?P<sign>\$)|(?P<name>[A-Za-z_]\w*)|\{(?P<braced>\w+)\}|(?P<open>\{))")


def expand_path(path: str, key: str) -> str:
    """Expands the environment variables and the home folder in a path.

    ``$$`` stands for a dollar sign, as does a ``$`` that no name follows. A URL is not changed. Nor
    is the path of an existing file if its variables are not set, so that the paths in a run's
    config.yaml can be read again.

    Args:
        path: path with ``$NAME``, ``${NAME}``, ``~`` or ``~user``.
        key: the path's key or option, for messages.

    Raises:
        UserError: for a variable that is not set or empty, an unknown user, or a NUL character.
    """
    if "\0" in path:
        raise config_error(f"{key} is {path!r}, which is not a path: remove the NUL")

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
