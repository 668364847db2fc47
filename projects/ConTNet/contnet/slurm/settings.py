"""Facts of a cluster and of jobs on it: from options, or from a yaml found by name."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path

import yaml

from contnet.config.paths import expand_path
from contnet.utils.errors import UserError

__all__ = ["ClusterSettings", "add_cluster_options", "read_settings"]

# What the submission itself decides, with what to use instead.
_OURS = {
    "array": "--sweep or --array",
    "error": "the log's place is fixed",
    "gpus-per-node": "--num-gpus and --gpu-type",
    "job-name": "it is the config's name",
    "no-requeue": "--max-requeues 0",
    "nodes": "--num-nodes",
    "ntasks": "--num-nodes and --num-gpus",
    "ntasks-per-node": "--num-gpus",
    "open-mode": "logs are appended to",
    "output": "the log's place is fixed",
    "requeue": "--max-requeues",
    "signal": "--signal-delay",
    "time": "--timeout-hours",
}


def _about(unit: str, meaning: str, **more) -> dict:
    return {"unit": unit, "meaning": meaning, **more}


def _setting(default: object, unit: str, meaning: str, **more) -> object:
    return field(default=default, metadata=_about(unit, meaning, **more))


@dataclass
class ClusterSettings:
    """Facts of a cluster and of jobs on it. Each field is an option, and a key of cluster files."""

    partition: str = _setting("", "NAME", "partition, or several with commas")
    account: str = _setting("", "NAME", "account that is charged")
    qos: str = _setting("", "NAME", "quality of service")
    constraint: str = _setting("", "FEATURES", "features that nodes must have")
    exclude: str = _setting("", "NODES", "nodes that are not used")
    gpu_type: str = _setting("", "TYPE", "of GPU, where nodes have several")
    mem_gb: float = _setting(0.0, "GB", "memory per node")
    cpus_per_gpu: int = _setting(0, "N", "CPU cores per GPU, so per process")
    timeout_hours: float = _setting(0.0, "H", "longest run between two requeues, as 24 or 0.5")
    signal_delay: int = _setting(180, "S", "seconds for saving before that time is over", least=1)
    max_requeues: int = _setting(20, "N", "how often a job may come back")
    hang_timeout: float = _setting(1800.0, "S", "seconds without progress that end a job", least=1)
    interface: str = _setting("", "NAME", "network interface between nodes, as ib0")
    container: str = _setting("", "COMMAND", "what Python is started with, as 'apptainer exec ...'")
    python: str = _setting("", "PATH", "Python in the job (default: this one)")
    assume_shared: bool = _setting(False, "", "all nodes see this machine's folders, /tmp too")
    setup: list = field(
        default_factory=list,
        metadata=_about("COMMAND", "shell command before the start; may be repeated"),
    )
    sbatch: dict = field(
        default_factory=dict,
        metadata=_about("KEY=VALUE", "any other option of sbatch; may be repeated"),
    )
    srun: dict = field(
        default_factory=dict,
        metadata=_about("KEY=VALUE", "any other option of srun; may be repeated"),
    )


def _default(each: Field) -> object:
    return each.default if each.default is not MISSING else each.default_factory()


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--cluster-file`` and an option for every field of :class:`ClusterSettings`."""
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--cluster-file",
        default="",
        metavar="NAME",
        help="yaml with any of the options below, found in ./clusters or ~/.config/contnet, "
        "or a path; options on the command line go before it",
    )
    for each in fields(ClusterSettings):
        default, meaning = _default(each), each.metadata["meaning"]
        option = {"dest": each.name, "help": meaning, "metavar": each.metadata["unit"]}
        if isinstance(default, bool):
            option = {"dest": each.name, "help": meaning, "action": "store_true", "default": None}
        elif isinstance(default, (list, dict)):
            option |= {"action": "append"}
        else:
            option |= {"type": type(default)}
            option["help"] += f" (default {default})" if default else ""
        group.add_argument(f"--{each.name.replace('_', '-')}", **option)


def _find_cluster_file(name: str) -> Path:
    if os.sep in name or name.endswith((".yaml", ".yml")):
        candidates = [Path(expand_path(name, "--cluster-file"))]
    else:
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        folders = (Path("clusters"), home / "contnet")
        candidates = [folder / f"{name}.yaml" for folder in folders]
    for path in candidates:
        if path.is_file():
            return path
    there = sorted({p.stem for path in candidates for p in path.parent.glob("*.yaml")})
    hint = f"; there are {', '.join(there)}" if there else ""
    looked = " and ".join(str(path.absolute()) for path in candidates)
    raise UserError(f"--cluster-file {name}: there is no {looked}{hint}")


def _read_cluster_file(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cluster file {path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"cluster file {path} must hold KEY: value lines")
    known = [each.name for each in fields(ClusterSettings)]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise UserError(f"cluster file {path}: there is no key {key}, the nearest is {near}")
    return content


def _typed(each: Field, value: object, where: str) -> object:
    """A setting of its own type, from a cluster file or an option."""
    default = _default(each)
    kind = type(default)
    if kind is list and isinstance(value, str):
        value = [value]
    if kind is list and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return value
    if kind is dict and isinstance(value, dict):
        return {str(k).removeprefix("--").replace("_", "-"): v for k, v in value.items()}
    if kind is str and isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (kind is float and number) or (kind is type(value) and kind not in (list, dict)):
        least = each.metadata.get("least", 0)
        if kind is not bool and value < least:
            raise UserError(f"{where} is {value}, it must be at least {least}")
        return kind(value)
    name = {list: "a list of texts", dict: "KEY: value lines", str: "a text", bool: "true or false"}
    raise UserError(f"{where} is {value!r}, it must be {name.get(kind, 'a number')}")


def _pairs(words: Sequence[str], option: str) -> dict[str, object]:
    """KEY=VALUE options; a KEY alone is True."""
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.removeprefix("--").replace("_", "-")
        if not re.fullmatch(r"[a-zA-Z][\w-]*", key):
            raise UserError(f"{option} {word!r}: write KEY=VALUE, as mail-type=END")
        pairs[key] = value if equals else True
    return pairs


def read_settings(args: argparse.Namespace) -> ClusterSettings:
    """Merges options over the cluster file over the defaults.

    Setup commands of both are run, the file's first; options of sbatch and srun are merged.

    Args:
        args: of a parser that :func:`add_cluster_options` was called with.

    Raises:
        UserError: for a file that is missing, an unknown key, or a value of a wrong type.
    """
    path = _find_cluster_file(args.cluster_file) if args.cluster_file else None
    given = _read_cluster_file(path) if path else {}
    settings = ClusterSettings()
    for each in fields(ClusterSettings):
        option, name = getattr(args, each.name), f"--{each.name.replace('_', '-')}"
        value = _default(each)
        if each.name in given:
            value = _typed(each, given[each.name], f"cluster file {path}: {each.name}")
        if isinstance(value, dict):
            value = {**value, **_pairs(option or [], name)}
        elif isinstance(value, list):
            value = [*value, *(option or [])]
        elif option is not None:
            value = _typed(each, option, name)
        setattr(settings, each.name, value)
    # The shell of the job sees neither; set-up commands and the container it expands itself.
    settings.python = expand_path(settings.python, "python")
    for name in ("sbatch", "srun"):
        given = getattr(settings, name)
        texts = {k: expand_path(v, f"{name} {k}") for k, v in given.items() if isinstance(v, str)}
        given.update(texts)
    for key in settings.sbatch:
        if key in _OURS:
            raise UserError(f"--sbatch {key} is set by the submission itself: {_OURS[key]}")
    return settings
