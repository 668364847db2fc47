"""The legal values of config keys, in words."""

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
    """The values that a key may have, if they can be listed."""
    if key in PARTS:
        return sorted(name for name, _ in PARTS[key])
    given = CHOICES.get(key) or values.CHOICES.get(key)
    if given is None and key.endswith(".NORM"):
        given = PART_NORMS
    return list(given or ())


def legal_values(key: str, default: object) -> str:
    """Describes the values that the checks before a run allow for a key.

    This does not include what its comment says, or which combinations of keys are allowed.

    Args:
        key: key with dots.
        default: its default, which has the required type.
    """
    if choices := _choices(key):
        return ", ".join(str(each) or "''" for each in choices)
    if key in values.COUNTS:
        return f"a whole number from {values.COUNTS[key]}"
    if key in values.RANGES:
        return f"a number in {values.RANGES[key]}"
    return _TYPES.get(type(default), "any plain value")
