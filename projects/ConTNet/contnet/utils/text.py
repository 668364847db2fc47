"""Words of messages."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

__all__ = ["describe_difference", "first_names", "nearest", "plural"]

_SHOWN = 3


def nearest(word: str, words: Sequence[str]) -> str:
    """The word that is most like it; among keys, the last part counts most."""
    upper = {name.upper(): name for name in words}
    if near := difflib.get_close_matches(word.upper(), upper, n=1, cutoff=0.0):
        return upper[near[0]]
    return words[0]


def plural(number: int, what: str) -> str:
    """``1 class``, ``2 classes``."""
    ending = "es" if what.endswith("s") else "s"
    return f"{number} {what}{ending if number != 1 else ''}"


def first_names(names: Sequence[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def describe_difference(names: Sequence[str], expected: Sequence[str]) -> str:
    """Says how two lists of names differ, "" if they do not."""
    here, there = set(names), set(expected)
    parts = []
    for what, some in (("too many", here - there), ("missing", there - here)):
        if some:
            shown = ", ".join(sorted(some)[:_SHOWN]) + (", ..." if len(some) > _SHOWN else "")
            parts.append(f"{len(some)} {what}: {shown}")
    if not parts and len(names) != len(expected):
        parts.append(f"{len(names)} instead of {len(expected)}, some of them more than once")
    elif not parts and list(names) != list(expected):
        pairs = zip(names, expected, strict=True)
        number, (one, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        parts.append(f"another order: number {number} is {one} instead of {other}")
    return "; ".join(parts)
