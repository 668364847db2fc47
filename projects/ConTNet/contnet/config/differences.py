"""How a config differs from one that was written down before, perhaps by another version."""

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
    """Values by key, of the types that a dumped config has."""
    return dict(flatten(yaml.safe_load(cfg.dump()), cfg))


@lru_cache(maxsize=1)
def _defaults() -> dict[str, object]:
    return _values(default_config())


def read_values(text: str, cfg: CfgNode) -> dict[str, object]:
    """Values by key of a config that ``cfg.dump()`` has written.

    Args:
        text: its yaml. Keys that it lacks, of a later version, have their defaults.
        cfg: says which keys there are.

    Raises:
        ValueError: if it is no yaml of keys.
    """
    try:
        content = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}")
    return {**_defaults(), **dict(flatten(content, cfg))}


def differences(before: Mapping[str, object], cfg: CfgNode) -> dict[str, tuple[object, object]]:
    """Values before and now of each key of ``cfg`` that has another one now.

    Args:
        before: of :func:`read_values`.
        cfg: the config of now.
    """
    now = _values(cfg)
    return {
        key: (before[key], value)
        for key, value in now.items()
        if key in before and before[key] != value
    }


def show(key: str, before: object, now: object) -> str:
    """A difference as one line shows it."""
    before, now = ("''" if value == "" else value for value in (before, now))
    return " ".join(f"{key} {before} -> {now}".split())
