"""Helpers for messages."""

from __future__ import annotations

import difflib
import sys
import unicodedata
from collections.abc import Sequence

__all__ = [
    "describe_difference",
    "first_names",
    "nearest",
    "plural",
    "printable",
    "printable_lines",
    "say",
]

_SHOWN = 3
# Control and format characters (ANSI escapes, bidirectional overrides), lone surrogates, and the
# two separators that end a line.
_NOT_PRINTED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# The first two join the letters of Persian and Indian languages, and many emoji; the others form
# flags such as that of Scotland.
_JOINERS = "\u200c\u200d" + "".join(map(chr, range(0xE0020, 0xE0080)))
_LONGEST_LINE = 10_000


def _escaped(char: str, kept: str) -> str:
    if char in kept or unicodedata.category(char) not in _NOT_PRINTED:
        return char
    return char.encode("unicode_escape").decode()


def printable(text: str, limit: int = 1000, keep: str = "") -> str:
    """Returns a text as one line for messages: escapes invisible characters and truncates it.

    Args:
        text: a name or a key from a file, or a message that contains them.
        limit: maximum number of characters that are kept.
        keep: characters that are not escaped.
    """
    shown, kept = text[:limit], keep + _JOINERS
    if not shown.isprintable():
        shown = "".join(_escaped(char, kept) for char in shown)
    return shown if len(text) <= limit else f"{shown}... ({len(text)} characters)"


def _line(text: str) -> str:
    return printable(text, _LONGEST_LINE, keep="\t")


def printable_lines(text: str) -> str:
    """Applies :func:`printable` to each line of a text, but keeps tabs."""
    return "\n".join(map(_line, text.split("\n")))


def say(*lines: str) -> None:
    """Prints texts that may contain names of files, classes or keys, each argument on one line.

    Escapes invisible characters as in :func:`printable`, and those that the terminal's encoding
    lacks.
    """
    encoding = sys.stdout.encoding or "utf-8"
    for line in map(_line, lines):
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def nearest(word: str, words: Sequence[str]) -> str:
    """Returns the most similar word, ignoring case."""
    upper = {name.upper(): name for name in words}
    if near := difflib.get_close_matches(word.upper(), upper, n=1, cutoff=0.0):
        return upper[near[0]]
    return words[0]


def plural(number: int, what: str) -> str:
    """Returns a number with its noun: ``1 class``, ``2 classes``."""
    ending = "es" if what.endswith("s") else "s"
    return f"{number} {what}{ending if number != 1 else ''}"


def first_names(names: Sequence[str]) -> str:
    """Returns the first of many names, which may be from a file, for a message."""
    return ", ".join(printable(str(name), 200) for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def describe_difference(names: Sequence[str], expected: Sequence[str]) -> str:
    """Describes how two lists of names differ; "" if they are equal."""
    here, there = set(names), set(expected)
    parts = []
    for what, some in (("too many", here - there), ("missing", there - here)):
        if some:
            shown = ", ".join(printable(name, 200) for name in sorted(some)[:_SHOWN]) + (
                ", ..." if len(some) > _SHOWN else ""
            )
            parts.append(f"{len(some)} {what}: {shown}")
    if not parts and len(names) != len(expected):
        parts.append(f"{len(names)} instead of {len(expected)}, some of them more than once")
    elif not parts and list(names) != list(expected):
        pairs = zip(names, expected, strict=True)
        number, (one, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        one, other = printable(one, 200), printable(other, 200)
        parts.append(f"another order: number {number} is {one} instead of {other}")
    return "; ".join(parts)
