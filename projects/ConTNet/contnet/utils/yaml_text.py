"""Reads yaml from untrusted files: only plain values, of limited size."""

from pathlib import Path

import yaml

from contnet.utils.files import open_regular

__all__ = ["LARGEST_YAML", "check_whole_numbers", "parse_yaml", "read_yaml"]

LARGEST_YAML = 2**18  # bytes or characters
_MOST_VALUES = 50_000
_DEEPEST = 100
_MOST_BITS = 64  # of an integer; Python prints integers only up to some length
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C, ten times faster


def check_whole_numbers(value: object) -> None:
    """Raises ValueError if a value, or one in its lists, is an integer of more than 64 bits."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ValueError(f"it has a whole number of more than {_MOST_BITS} bits")
    for each in value if isinstance(value, list | tuple) else ():
        check_whole_numbers(each)


class _Loader(_LOADER):
    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        check_whole_numbers(value)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _check_depth(text: str) -> None:
    """Raises yaml.YAMLError if a text is nested so deeply that the loader in C would crash."""
    depth = 0
    for event in yaml.parse(text, _LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} deep")


def _count(node: yaml.Node, most: int, counted: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Returns the number of values in a node, including repeats by aliases, and its depth."""
    if id(node) not in counted:
        values = node.value if isinstance(node, yaml.CollectionNode) else ()
        below = [each for value in values for each in (value if type(value) is tuple else (value,))]
        counted[id(node)] = most + 1, 0  # for a node that contains itself
        inside = [_count(each, most, counted) for each in below]
        depth = 1 + max((deep for _, deep in inside), default=0)
        counted[id(node)] = 1 + sum(number for number, _ in inside), depth
    number, depth = counted[id(node)]
    if number > most:
        raise yaml.YAMLError(f"it has more than {most} values, aliases included")
    if depth > _DEEPEST + 1:
        raise yaml.YAMLError(f"it is nested more than {_DEEPEST} deep, aliases included")
    return number, depth


def _load(text: str, most: int) -> object:
    _check_depth(text)
    loader = _Loader(text)
    try:
        if (node := loader.get_single_node()) is None:
            return None
        _count(node, most, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def parse_yaml(text: str, largest: int = LARGEST_YAML, most: int = _MOST_VALUES) -> object:
    """Parses yaml of plain values, without Python tags.

    Args:
        text: content of the file.
        largest: maximum number of characters.
        most: maximum number of values, including repeats by aliases.

    Raises:
        yaml.YAMLError: if it is not valid, too long, nested too deeply, or has too many values.
    """
    if len(text) > largest:
        raise yaml.YAMLError(f"it has more than {largest} characters")
    try:
        return _load(text.removeprefix("\ufeff"), most)
    except (OverflowError, ValueError) as error:  # such as a date in a 13th month
        raise yaml.YAMLError(f"it has a value that cannot be read ({error})") from error


def read_yaml(path: str | Path) -> object:
    """Returns the values in a file, as :func:`parse_yaml`.

    Raises:
        OSError: if it cannot be read, or is not a file.
        UnicodeDecodeError: if it is not UTF-8 text.
        yaml.YAMLError: as in :func:`parse_yaml`, and for more than :data:`LARGEST_YAML` bytes.
    """
    with open_regular(path) as file:
        data = file.read(LARGEST_YAML + 1)
    if len(data) > LARGEST_YAML:
        raise yaml.YAMLError(f"it has more than {LARGEST_YAML} bytes")
    return parse_yaml(data.decode())
