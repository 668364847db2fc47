"""Helpers for the keys of nested configs, and errors about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from detectron2.config import CfgNode

from contnet.utils.errors import UsageError

__all__ = ["config_error", "flatten", "get_value"]


def flatten(node: Mapping, like: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields dotted keys and values of nested mappings, as deep as ``like`` is nested."""
    for key, value in node.items():
        below = like.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            yield from flatten(value, below, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def get_value(cfg: CfgNode, key: str) -> object:
    """Returns the value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def config_error(message: str) -> UsageError:
    """Returns an error with the message on one line, whatever it quotes."""
    return UsageError(" ".join(message.split()))
