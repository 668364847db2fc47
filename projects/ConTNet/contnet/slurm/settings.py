"""Settings of a cluster and its jobs, from options or a yaml file that is found by name."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path

import yaml

from contnet.config.paths import expand_path
from contnet.utils.errors import UsageError
from contnet.utils.text import printable
from contnet.utils.yaml_text import read_yaml

__all__ = ["ClusterSettings", "add_cluster_options", "check_text", "read_settings"]

# Options of sbatch that the submission sets itself, and what to use instead.
_OURS = {
    "array": "--sweep or --array",
    "error": "the log's path is fixed",
    "gpus-per-node": "--num-gpus and --gpu-type",
    "job-name": "it is the config's name",
    "no-requeue": "--max-requeues 0",
    "nodes": "--num-nodes",
    "ntasks": "--num-nodes and --num-gpus",
    "ntasks-per-node": "--num-gpus",
    "open-mode": "logs are appended to",
    "output": "the log's path is fixed",
    "requeue": "--max-requeues",
    "signal": "--signal-delay",
    "time": "--timeout-hours",
    "wrap": "the job is the training",
}
# Settings that are written into #SBATCH lines.
_DIRECTIVES = ("partition", "account", "qos", "constraint", "exclude", "gpu_type")
_MOST = 10**9  # largest number


def _about(unit: str, meaning: str, **more) -> dict:
    return {"unit": unit, "meaning": meaning, **more}


def _setting(default: object, unit: str, meaning: str, **more) -> object:
    return field(default=default, metadata=_about(unit, meaning, **more))


@dataclass
class ClusterSettings:
    """Settings of a cluster and its jobs. Each field is an option, and a key of cluster files."""

    partition: str = _setting("", "NAME", "partition, or several with commas")
    account: str = _setting("", "NAME", "account to charge")
    qos: str = _setting("", "NAME", "quality of service")
    constraint: str = _setting(
        "", "FEATURES", "features that nodes must have (sbatch --constraint)"
    )
    exclude: str = _setting("", "NODES", "nodes to exclude")
    gpu_type: str = _setting("", "TYPE", "GPU type, where the partition has several")
    mem_gb: float = _setting(0.0, "GB", "memory per node")
    cpus_per_gpu: int = _setting(0, "N", "CPU cores per GPU, that is per process")
    timeout_hours: float = _setting(
        0.0, "H", "time limit of the job until a requeue, such as 24 or 0.5", most=10**6
    )
    signal_delay: int = _setting(
        180, "S", "seconds for saving before the time limit", least=1, most=65535
    )
    max_requeues: int = _setting(20, "N", "how often a job may be requeued")
    hang_timeout: float = _setting(
        1800.0, "S", "end the job after this many seconds without progress", least=1
    )
    interface: str = _setting("", "NAME", "network interface between nodes, such as ib0")
    container: str = _setting(
        "", "COMMAND", "prefix of the Python command, such as 'apptainer exec ...'"
    )
    python: str = _setting("", "PATH", "Python in the job (default: this one)")
    assume_shared: bool = _setting(False, "", "all nodes share this machine's folders, even /tmp")
    setup: list = field(
        default_factory=list,
        metadata=_about("COMMAND", "shell command to run before the training; may be repeated"),
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
        help="yaml with any of the options below: a name in ./clusters or ~/.config/contnet, "
        "or a path; options on the command line override it",
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
    raise UsageError(f"--cluster-file {name}: there is no {looked}{hint}")


def _read_cluster_file(path: Path) -> dict:
    try:
        content = read_yaml(path) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"cluster file {path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise UsageError(f"cluster file {path} must contain KEY: value lines")
    known = [each.name for each in fields(ClusterSettings)]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise UsageError(f"cluster file {path}: there is no key {key}, the nearest is {near}")
    return content


def _typed(each: Field, value: object, where: str) -> object:
    """Converts a setting of a cluster file or an option to its type."""
    default = _default(each)
    kind = type(default)
    if kind is list and isinstance(value, str):
        value = [value]
    if kind is list and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return value
    if kind is dict and isinstance(value, dict):
        return {_option_key(str(k), where): v for k, v in value.items()}
    if kind is str and isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (kind is float and number) or (kind is type(value) and kind not in (list, dict)):
        least, most = each.metadata.get("least", 0), each.metadata.get("most", _MOST)
        if kind is not bool and not least <= value <= most:  # NaN fails, too
            raise UsageError(f"{where} is {value}, it must be at least {least} and at most {most}")
        return kind(value)
    name = {
        list: "a list of strings",
        dict: "KEY: value lines",
        str: "a string",
        bool: "true or false",
    }
    raise UsageError(f"{where} is {value!r}, it must be {name.get(kind, 'a number')}")


def _option_key(word: str, where: str) -> str:
    """Returns the name of an option of sbatch or srun, without leading dashes."""
    key = word.removeprefix("--").replace("_", "-")
    if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9-]*", key):
        raise UsageError(f"{where} {word!r}: write KEY=VALUE, such as mail-type=END")
    return key


def _pairs(words: Sequence[str], option: str) -> dict[str, object]:
    """Parses KEY=VALUE options; KEY without a value is True."""
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        pairs[_option_key(key, option)] = value if equals else True
    return pairs


def check_text(text: str, where: str, directive: bool = False) -> None:
    """Checks a string that becomes part of a line that sbatch or a shell reads.

    Args:
        text: a setting, a path or a name.
        where: name of the text, for messages.
        directive: whether it is in an ``#SBATCH`` line, where sbatch reads quotes and backslashes
            differently from a shell.

    Raises:
        UsageError: if it could add lines or values.
    """
    if printable(text, len(text), keep="" if directive else "\t") != text:
        raise UsageError(
            f"{where} is '{printable(text)}': line breaks, control characters and invalid bytes "
            "cannot be passed to sbatch or a shell; remove them, and give commands one by one"
        )
    if directive and (sign := next((each for each in text if each in "'\"\\"), "")):
        raise UsageError(f"{where} is {text!r}, and sbatch accepts no {sign} there: remove it")


def _is_finite(value: object) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and math.isfinite(value))


def _check_texts(settings: ClusterSettings) -> None:
    """Checks all strings of the settings, from cluster files and options alike."""
    for each in fields(ClusterSettings):
        value = getattr(settings, each.name)
        if isinstance(value, str):
            check_text(value, each.name, each.name in _DIRECTIVES)
        for text in value if isinstance(value, list) else ():
            check_text(text, each.name)
        for key, text in value.items() if isinstance(value, dict) else ():
            if isinstance(text, str):
                check_text(text, f"{each.name} {key}", each.name == "sbatch")
            elif text is not True and not _is_finite(text):
                raise UsageError(
                    f"{each.name} {key} is {text!r}, it must be a string, a number or true"
                )


def read_settings(args: argparse.Namespace) -> ClusterSettings:
    """Merges options, the cluster file and the defaults, in this order of precedence.

    Setup commands of both are run, the file's first; options of sbatch and srun are merged.

    Args:
        args: arguments from a parser with :func:`add_cluster_options`.

    Raises:
        UsageError: if the file is missing, or for an unknown key, a value of a wrong type, or a
            text with line breaks or control characters.
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
    # The job's shell does not expand these, unlike set-up commands and the container.
    settings.python = expand_path(settings.python, "python")
    for name in ("sbatch", "srun"):
        given = getattr(settings, name)
        texts = {k: expand_path(v, f"{name} {k}") for k, v in given.items() if isinstance(v, str)}
        given.update(texts)
    _check_texts(settings)
    for key in settings.sbatch:
        if key in _OURS:
            raise UsageError(f"--sbatch {key} is set by the submission itself: {_OURS[key]}")
    return settings
