"""Reads the meaning of keys from the comments in this project's and Detectron2's sources."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

from detectron2.config import defaults

from contnet.config import keys

__all__ = ["Definition", "find_definition", "read_definitions"]

# Names of the root node in source files, and comments that only draw a line.
_ROOTS = ("cfg", "_C")
_RULE = re.compile(r"#[\s#=-]*")


@dataclass(frozen=True)
class Definition:
    """The definition of a key or a group of keys.

    Attributes:
        comment: the text of the comment, on one line; "" if there is none.
        file: path of the source.
        line: line of the definition, from 1.
        ours: whether it is defined in this project, not in Detectron2.
    """

    comment: str
    file: str
    line: int
    ours: bool


def _read_comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Returns comments by line: those on a line of their own, and those after code."""
    alone, behind = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = "" if _RULE.fullmatch(token.string) else token.string.removeprefix("#").strip()
            own_line = not token.line[: token.start[1]].strip()
            (alone if own_line else behind)[token.start[0]] = text
    return alone, behind


def _keys_of(statement: ast.Assign) -> list[str]:
    """Returns the keys that ``cfg.A.B = ...`` or ``cfg.A = CfgNode({"B": ...})`` defines."""
    root, _, key = ast.unparse(statement.targets[0]).partition(".")
    if root not in _ROOTS or not key:
        return []
    mapping = next(iter(getattr(statement.value, "args", ())), None)
    below = mapping.keys if isinstance(mapping, ast.Dict) else []
    return [key, *(f"{key}.{name.value}" for name in below)]


def read_definitions(module: ModuleType) -> dict[str, Definition]:
    """Returns the definitions of keys and groups of keys in a module, by dotted key.

    A definition's comment is the one right above it, followed by those at the end of its lines.
    """
    source, file = inspect.getsource(module), inspect.getsourcefile(module)
    alone, behind = _read_comments(source)
    found = {}
    for node in ast.walk(ast.parse(source)):
        keys_here = _keys_of(node) if isinstance(node, ast.Assign) else []
        if not keys_here:
            continue
        first = node.lineno
        while first - 1 in alone:
            first -= 1
        lines = [alone[line] for line in range(first, node.lineno)]
        lines += [behind.get(line, "") for line in range(node.lineno, node.end_lineno + 1)]
        text = " ".join(" ".join(lines).split())
        found |= {
            key: Definition(text, file, node.lineno, ours=module is keys) for key in keys_here
        }
    return found


@lru_cache(maxsize=1)
def _all_definitions() -> dict[str, Definition]:
    return {**read_definitions(defaults), **read_definitions(keys)}


def find_definition(key: str) -> Definition | None:
    """Returns where a key or a group of keys is defined, and its comment.

    Args:
        key: dotted key.

    Returns:
        The definition; None for a key of an extension.
    """
    return _all_definitions().get(key)
