"""Describes the legal values of config keys."""

from __future__ import annotations

from contnet.config import values
from contnet.launch.preflight_config import CHOICES, PART_NORMS, PARTS

__all__ = ["legal_values"]

_TYPES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    tuple: "a list",
}


def _choices(key: str) -> list[object]:
    """Returns the values that a key may have; empty if they cannot be listed."""
    if key in PARTS:
        return sorted(name for name, _ in PARTS[key])
    given = CHOICES.get(key) or values.CHOICES.get(key)
    if given is None and key.endswith(".NORM"):
        given = PART_NORMS
    return list(given or ())


def legal_values(key: str, default: object) -> str:
    """Describes the values that the checks before a run allow for a key.

    Limits that only the key's comment mentions, and rules for several keys, are not included.

    Args:
        key: key with dots.
        default: default of the key, which has the required type.
    """
    if choices := _choices(key):
        return ", ".join(str(each) or "''" for each in choices)
    if key in values.COUNTS:
        return f"a whole number from {values.COUNTS[key]}"
    if key in values.RANGES:
        return f"a number in {values.RANGES[key]}"
    return _TYPES.get(type(default), "any plain value")
