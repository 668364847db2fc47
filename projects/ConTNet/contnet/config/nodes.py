"""Keys of nested configs, and errors about them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence

from detectron2.config import CfgNode

from contnet.utils.errors import UserError

__all__ = ["flatten", "get_value", "nearest", "one_line"]


def flatten(node: Mapping, like: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Keys with dots and values of nested mappings, as deep as ``like`` goes."""
    for key, value in node.items():
        below = like.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            yield from flatten(value, below, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def get_value(cfg: CfgNode, key: str) -> object:
    """The value of a key with dots."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def one_line(message: str) -> UserError:
    """An error whose message has no line breaks, whatever it quotes."""
    return UserError(" ".join(message.split()))


def nearest(word: str, words: Sequence[str]) -> str:
    """The word that is most like it; among keys, the last part counts most."""
    upper = {name.upper(): name for name in words}
    if near := difflib.get_close_matches(word.upper(), upper, n=1, cutoff=0.0):
        return upper[near[0]]
    return words[0]
