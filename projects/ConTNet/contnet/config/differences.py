"""Differences between a config and one that was saved before, perhaps by another version."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import yaml
from detectron2.config import CfgNode

from contnet.config.keys import default_config
from contnet.config.nodes import flatten
from contnet.utils.yaml_text import parse_yaml

__all__ = ["differences", "read_values", "show"]


def _values(cfg: CfgNode) -> dict[str, object]:
    """Returns the values by dotted key, with the types of a dumped config."""
    return dict(flatten(yaml.safe_load(cfg.dump()), cfg))


@lru_cache(maxsize=1)
def _defaults() -> dict[str, object]:
    return _values(default_config())


def read_values(text: str, cfg: CfgNode) -> dict[str, object]:
    """Returns the values by dotted key of a config that ``cfg.dump()`` has written.

    Args:
        text: its yaml. Keys that it lacks, because a later version added them, have their defaults.
        cfg: a config, whose groups of keys are those of ``text``.

    Raises:
        ValueError: if it is not a yaml of keys.
    """
    try:
        content = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"it is a {type(content).__name__}, not a mapping of keys")
    return {**_defaults(), **dict(flatten(content, cfg))}


def differences(before: Mapping[str, object], cfg: CfgNode) -> dict[str, tuple[object, object]]:
    """Returns the old and the new value of each key of ``cfg`` whose value has changed.

    Args:
        before: values from :func:`read_values`.
        cfg: the current config.
    """
    now = _values(cfg)
    return {
        key: (before[key], value)
        for key, value in now.items()
        if key in before and before[key] != value
    }


def show(key: str, before: object, now: object) -> str:
    """Formats a difference as one line."""
    before, now = ("''" if value == "" else value for value in (before, now))
    return " ".join(f"{key} {before} -> {now}".split())
