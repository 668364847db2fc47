"""Strict reading of config files and overrides."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from typing import IO

import yaml
from detectron2.config import CfgNode
from fvcore.common.config import BASE_KEY

from contnet.config.keys import default_config
from contnet.config.nodes import config_error, flatten, get_value
from contnet.config.paths import expand_path
from contnet.config.shipped import find_config
from contnet.config.values import check_values
from contnet.utils.addresses import CREDENTIALS_ADVICE, has_credentials
from contnet.utils.errors import UsageError
from contnet.utils.text import nearest
from contnet.utils.yaml_text import check_whole_numbers, parse_yaml, read_yaml

__all__ = ["is_set", "load_config", "load_finished_config", "parse_config", "set_level"]

# Keys of a path or a list of paths, besides DATASETS.REGISTER.
_PATHS = (
    "DATASETS.CACHE_DIR",
    "DATASETS.PROPOSAL_FILES_TEST",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "MODEL.WEIGHTS",
    "OUTPUT_DIR",
)
# Maximum number of files of a config, to detect one that includes itself; ours have three.
_MOST_FILES = 100


def _read_file(config_file: str) -> object:
    """Returns the content of one config file.

    Raises:
        UserError: if it is not a file, or not a yaml of plain values.
    """
    try:
        return read_yaml(config_file)
    except UnicodeDecodeError as error:
        raise config_error(f"{config_file} is not UTF-8 text") from error
    except OSError as error:
        raise config_error(f"{config_file} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{config_file}, line {mark.line + 1}" if mark else config_file
        problem = getattr(error, "problem", None) or str(error)
        hint = "write plain values" if "tag:" in problem else "fix the yaml there"
        raise config_error(f"{place}: {problem}; {hint}") from error


def _config_path(config_file: str) -> str:
    """Returns the path that --config-file stands for."""
    return find_config(expand_path(config_file, "--config-file"))


def _find(config_file: str, what: str) -> str:
    """Returns the path of a config file; raises UserError if it does not exist."""
    if "://" in config_file:
        raise config_error(f"{what} {config_file} is a URL: download it, and give the file")
    if not os.path.isfile(config_file):
        raise config_error(f"{what} {config_file} does not exist, or is not a file")
    return config_file


def _bases(content: object, config_file: str) -> list[str]:
    """Returns the files that a config builds on; relative paths start in the config's folder."""
    bases = content.get(BASE_KEY, []) if isinstance(content, dict) else []
    where, folder = f"{config_file}: {BASE_KEY}", os.path.dirname(config_file)
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) for base in bases):
        raise config_error(f"{where} must be a file, or a list of them")
    return [_find(os.path.join(folder, expand_path(base, where)), where) for base in bases]


class _Yaml(CfgNode):
    """Reads config files whose ``_BASE_`` may contain environment variables, and must be files."""

    opened = 0

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        cls.opened += 1
        if cls.opened > _MOST_FILES:
            raise config_error(
                f"{filename} is one of more than {_MOST_FILES} files that are read for one config: "
                f"its {BASE_KEY} includes itself"
            )
        content = _read_file(filename)
        if isinstance(content, dict) and BASE_KEY in content:
            content[BASE_KEY] = [os.path.abspath(base) for base in _bases(content, filename)]
        return io.StringIO(yaml.safe_dump(content))


def _read_yaml(config_file: str) -> dict:
    """Returns the content of a config file, merged over its ``_BASE_``."""
    if not config_file:
        raise UsageError("no config file is given, give one of configs/ with --config-file")
    config_file = _config_path(config_file)
    _Yaml.opened = 0
    try:
        content = _Yaml.load_yaml_with_base(_find(config_file, "the config file"))
    except (AssertionError, AttributeError, TypeError) as error:
        reason = (
            str(error) if isinstance(error, AssertionError) else "must contain KEY: value lines"
        )
        raise config_error(f"{config_file}, with its _BASE_: {reason}") from error
    if not isinstance(content, dict):
        raise config_error(f"{config_file} contains {content!r}, it must contain KEY: value lines")
    if content.get("VERSION", 2) != 2:
        raise config_error(f"{config_file} has VERSION {content['VERSION']!r}, only 2 can be read")
    return content


def _assign(cfg: CfgNode, key: str, value: object, where: str) -> None:
    """Sets one key, with its value decoded as in Detectron2, or raises UserError."""
    if has_credentials(str(value)):
        raise config_error(f"{where}: {key} {CREDENTIALS_ADVICE}")
    known = dict(flatten(cfg, cfg))
    if key not in known:
        parents = {name.rpartition(".")[0] for name in known}
        if key in parents:
            raise config_error(f"{where}: {key} is a group of keys, it has no value of its own")
        raise config_error(
            f"{where}: there is no key {key}, the nearest is {nearest(key, list(known))}"
        )
    default = known[key]
    attempts = [value]
    if isinstance(default, float) and not isinstance(value, bool):
        attempts.append(_as_float(value))
    if isinstance(default, str) and isinstance(value, str):
        attempts.append(repr(value))
    for attempt in attempts:
        try:
            cfg.merge_from_list([key, attempt])
        except (ValueError, TypeError, SyntaxError, AssertionError, MemoryError, RecursionError):
            continue
        try:
            check_whole_numbers(get_value(cfg, key))
        except ValueError as error:
            raise config_error(f"{where}: {key}: {error}") from error
        # yacs accepts None for every key. Of the keys with a default, only floats may be None
        # (SOLVER.WEIGHT_DECAY_NORM); their ranges exclude it for the others.
        if get_value(cfg, key) is not None or default is None or isinstance(default, float):
            return
    kind = type(default).__name__
    raise config_error(
        f"{where}: {key} is {value!r}, it must be of type {kind}, such as {default!r}"
    )


def _as_float(value: object) -> object:
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        return value


def _pairs(opts: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Returns the keys and values of a list of overrides.

    Raises:
        UserError: if it is not KEY VALUE KEY VALUE.
    """
    form = "write KEY VALUE pairs, such as SOLVER.BASE_LR 0.01"
    for key in opts[::2]:
        if "=" in str(key):
            raise config_error(f"overrides: {key!r} is one word, {form}")
        if not isinstance(key, str) or key.startswith("-"):
            raise config_error(f"overrides: {key!r} is not a key, {form}")
    if len(opts) % 2:
        raise config_error(f"overrides: {opts[-1]!r} has no value, {form}")
    return zip(opts[::2], opts[1::2], strict=True)


def _expand_paths(cfg: CfgNode) -> None:
    """Expands variables and home folders in all paths; makes those of data sets absolute."""
    for key in _PATHS:
        parent, _, name = key.rpartition(".")
        node = get_value(cfg, parent) if parent else cfg
        if isinstance(node[name], str):
            node[name] = expand_path(node[name], key)
        else:
            node[name] = tuple(expand_path(str(each), key) for each in node[name])
    cfg.DATASETS.REGISTER = [
        [name, *(os.path.abspath(expand_path(path, "DATASETS.REGISTER")) for path in paths)]
        for name, *paths in cfg.DATASETS.REGISTER
    ]


def _sets(content: object, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            return False
        content = content[part]
    return True


def set_level(key: str, config_file: str, opts: Sequence[str]) -> int | None:
    """Returns the nesting depth of the file that sets a key.

    Args:
        key: dotted key.
        config_file: a config file that :func:`load_config` has read.
        opts: ``[KEY, VALUE, KEY, VALUE, ...]``.

    Returns:
        0 for the config file itself and the overrides, 1 for its ``_BASE_``, 2 for the base of its
        base, and so on; None if none of them sets the key.
    """
    if key in opts[::2]:
        return 0
    config_file = _config_path(config_file)
    content = _read_file(config_file)
    if _sets(content, key):
        return 0
    levels = []
    for base in _bases(content, config_file):
        level = set_level(key, base, ())
        levels += [] if level is None else [level + 1]
    return min(levels, default=None)


def is_set(key: str, config_file: str, opts: Sequence[str]) -> bool:
    """Whether a config file itself, not its ``_BASE_``, or the overrides set a key.

    Args:
        key: dotted key.
        config_file: a config file that :func:`load_config` has read.
        opts: ``[KEY, VALUE, KEY, VALUE, ...]``.
    """
    return key in opts[::2] or _sets(_read_file(_config_path(config_file)), key)


def _substitute_sync_bn(cfg: CfgNode) -> None:
    """Replaces SyncBN, which requires GPUs, with Detectron2's slower one on the CPU."""
    if cfg.MODEL.DEVICE != "cpu":
        return
    for key, value in list(flatten(cfg, cfg)):
        if key.endswith(".NORM") and value == "SyncBN":
            cfg.merge_from_list([key, "naiveSyncBN"])


def _merge(content: dict, where: str, opts: Sequence[str]) -> CfgNode:
    """Returns the defaults, overridden by a config's content and then ``opts``; checked."""
    cfg = default_config()
    for key, value in flatten(content, cfg):
        _assign(cfg, key, value, where)
    for key, value in _pairs(list(opts)):
        _assign(cfg, key, value, "overrides")
    check_values(cfg)
    _expand_paths(cfg)
    _substitute_sync_bn(cfg)
    return cfg


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Reads a config file and overrides into a full config, not frozen.

    Whether its values suit the models is checked in preflight.

    On the CPU, SyncBN becomes "naiveSyncBN", which any backend can run.

    Args:
        config_file: a yaml file, which may build on a ``_BASE_``; Python tags are errors.
        opts: ``[KEY, VALUE, KEY, VALUE, ...]``.

    Returns:
        The config, with its paths expanded (:func:`contnet.config.paths.expand_path`) and those of
        DATASETS.REGISTER absolute.

    Raises:
        UserError: for a file that cannot be read, an unknown key, a value of a wrong type or an
            illegal one, and overrides that are not pairs.
    """
    return _merge(_read_yaml(config_file), config_file, opts)


def parse_config(text: str, where: str) -> CfgNode:
    """Returns the config that a run has saved with its weights, not frozen.

    Keys that it lacks, because an earlier version wrote it, have their defaults.

    Args:
        text: yaml from ``cfg.dump()``.
        where: its name in messages.

    Raises:
        UserError: as in :func:`load_config`.
    """
    try:
        content = parse_yaml(text)
    except yaml.YAMLError as error:
        raise config_error(f"{where} cannot be read") from error
    if not isinstance(content, dict) or BASE_KEY in content:
        raise config_error(f"{where} is not a full config")
    return _merge(content, where, ())


def load_finished_config(config_file: str) -> CfgNode:
    """Reads the full config that ``cfg.dump()`` wrote; its values are not checked again.

    Returns:
        The config, frozen; each value has its original type.

    Raises:
        UserError: if the file cannot be read, or lacks some of this project's keys.
    """
    content = _read_yaml(config_file)
    cfg = default_config()
    if missing := dict(flatten(cfg, cfg)).keys() - dict(flatten(content, cfg)).keys():
        raise config_error(f"{config_file} is not a full config, it lacks {min(missing)}")
    try:
        cfg.merge_from_other_cfg(CfgNode(content))
    except (KeyError, ValueError) as error:
        raise config_error(f"{config_file}: {error}; submit the run again") from error
    cfg.freeze()
    return cfg
