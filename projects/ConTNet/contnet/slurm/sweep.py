"""Several runs from one command line: products of values, and files of arguments."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from contnet.config.paths import expand_path
from contnet.launch.arguments import config_parser
from contnet.utils.errors import UsageError, UserError
from contnet.utils.files import open_regular

__all__ = ["RunArguments", "expand_runs"]

_CONFIG_FILE = "config-file"
_LONGEST_NAME = 120


@dataclass
class RunArguments:
    """The arguments of one run of an array.

    Attributes:
        config_file: config file as given.
        opts: ``[KEY, VALUE, KEY, VALUE, ...]``.
        resume: resume from the last checkpoint.
        eval_only: only evaluate.
        own: settings from its line of ``--array`` and from ``--sweep``, by key; also in ``opts``.
        only: settings from ``--only``, by key; also in ``opts``, at the end.
        name: name of the run's folder; "" for a single run.
    """

    config_file: str
    opts: list[str]
    resume: bool = False
    eval_only: bool = False
    own: dict[str, str] = field(default_factory=dict)
    only: dict[str, str] = field(default_factory=dict)
    name: str = ""

    @property
    def values(self) -> dict[str, str]:
        """Last value that was given for each key."""
        given: dict[str, str] = {}
        for key, value in zip(self.opts[::2], self.opts[1::2], strict=True):
            given.pop(key, None)  # in the order of the last values
            given[key] = value
        flags = {"resume": self.resume, "eval-only": self.eval_only}
        set_flags = {name: "True" for name, value in flags.items() if value}
        return {_CONFIG_FILE: self.config_file, **set_flags, **given}


def _split_values(text: str) -> list[str]:
    """Splits a text at the commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _parse_sweep(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    parts = _split_values(values)
    if not key or not equals or not all(parts):
        raise UsageError(
            f"--sweep {text!r}: write KEY=VALUE,VALUE, such as SOLVER.BASE_LR=0.01,0.02"
        )
    if double := [part for part in parts if parts.count(part) > 1]:
        raise UsageError(f"--sweep {text!r} has the value {double[0]} twice")
    return key.removeprefix("--"), parts


def _read_array(path: str) -> list[tuple[int, list[str]]]:
    """Returns the line numbers and words of the lines that are not empty."""
    try:
        with open_regular(expand_path(path, "--array"), "r") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UsageError(f"--array {path} cannot be read: {reason}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: {error}") from error
        if words:
            found.append((number, words))
    if not found:
        raise UsageError(f"--array {path} has no line of arguments")
    return found


def _parse_line(words: Sequence[str], where: str) -> argparse.Namespace:
    parser = config_parser("", "", required=False)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--eval-only", action="store_true")
    try:
        line = parser.parse_intermixed_args(words)
    except UserError as error:
        raise UsageError(
            f"{where}: {error}; a line may contain --config-file, --resume, --eval-only and KEY "
            "VALUE"
        ) from error
    if len(line.opts) % 2:
        raise UsageError(f"{where}: {line.opts[-1]!r} has no value, write KEY VALUE pairs")
    return line


def _opts(settings: Mapping[str, str]) -> list[str]:
    """Returns ``[KEY, VALUE, KEY, VALUE, ...]``."""
    return [word for pair in settings.items() for word in pair]


def _every_run(args: argparse.Namespace) -> list[RunArguments]:
    lines = [argparse.Namespace(config_file=None, opts=[], resume=False, eval_only=False)]
    if args.array:
        numbered = _read_array(args.array)
        lines = [_parse_line(words, f"{args.array}, line {n}") for n, words in numbered]
    sweeps = [_parse_sweep(text) for text in args.sweep]
    keys = [key for key, _ in sweeps]
    if double := [key for key in keys if keys.count(key) > 1]:
        raise UsageError(f"--sweep {double[0]} is given twice: list all its values in one")
    runs = []
    for line, *values in itertools.product(lines, *(values for _, values in sweeps)):
        swept = dict(zip(keys, values, strict=True))
        own = dict(zip(line.opts[::2], line.opts[1::2], strict=True)) | swept
        if line.config_file:
            own = {_CONFIG_FILE: line.config_file, **own}
        config_file = own.get(_CONFIG_FILE, args.config_file)
        swept.pop(_CONFIG_FILE, None)
        opts = [*args.opts, *line.opts, *_opts(swept)]
        resume, eval_only = args.resume or line.resume, args.eval_only or line.eval_only
        runs.append(RunArguments(config_file, opts, resume, eval_only, own))
    return runs


def _parse_only(condition: str, text: str) -> tuple[str, str, dict[str, str]]:
    """Returns a key and value that runs must have, and the settings for these runs."""
    key, equals, value = condition.partition("=")
    if not key or not equals:
        raise UsageError(
            f"--only {condition!r}: write KEY=VALUE 'KEY VALUE ...', such as "
            "MODEL.CLASSIFIER.NAME=resnet18 'SOLVER.BASE_LR 0.05'"
        )
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--only {condition} {text!r}: {error}") from error
    if not words or len(words) % 2:
        raise UsageError(f"--only {condition} {text!r}: the settings must be pairs KEY VALUE")
    return key.removeprefix("--"), value, dict(zip(words[::2], words[1::2], strict=True))


def _apply_only(only: Sequence[Sequence[str]], runs: Sequence[RunArguments]) -> None:
    """Applies the settings of ``--only`` to the runs that match."""
    for condition, text in only:
        key, value, settings = _parse_only(condition, text)
        having = [run for run in runs if run.own.get(key) == value]
        if not having:
            given = list(dict.fromkeys(run.own[key] for run in runs if key in run.own))
            raise UsageError(
                f"--only {condition} matches no run, "
                + (f"{key} is {' or '.join(given)}" if given else f"{key} is not swept")
            )
        for run in having:
            if fixed := [name for name in settings if name in run.own]:
                raise UsageError(
                    f"--only {condition}: {fixed[0]} is set by --sweep or --array, remove it"
                )
            run.only |= settings


def _safe(text: str) -> str:
    """Replaces the characters of a text that are not safe in the name of a folder."""
    return re.sub(r"[^\w.+=-]+", "_", text).strip("_.") or "_"


def _name_runs(runs: Sequence[RunArguments], swept: Sequence[str]) -> None:
    """Names runs by the keys that differ or are swept, followed by the settings of ``--only``.

    A swept key is in the names even if it has only one value, so that the same command with more
    values finds the folders that it created before.
    """
    values = [run.values for run in runs]
    files = {run.config_file for run in runs}
    if len({Path(file).stem for file in files}) == len(files):
        for each in values:
            each[_CONFIG_FILE] = Path(each[_CONFIG_FILE]).stem
    keys = list(dict.fromkeys(key for each in values for key in each))
    told = [key for key in keys if key in swept or len({each.get(key) for each in values}) > 1]
    named = list(dict.fromkeys([*told, *(key for run in runs for key in run.only)]))
    last = [key.rpartition(".")[2] for key in named]
    short = {
        key: end if last.count(end) == 1 else key for key, end in zip(named, last, strict=True)
    }
    for run, given in zip(runs, values, strict=True):
        shown = {key: given[key] for key in told if key in given} | run.only
        parts = [
            ("" if key == _CONFIG_FILE else f"{short[key]}=") + _safe(value)
            for key, value in shown.items()
        ]
        run.name = ",".join(parts) or "default"
        if len(run.name) > _LONGEST_NAME:
            digest = hashlib.sha256(run.name.encode()).hexdigest()[:8]
            run.name = f"{run.name[:_LONGEST_NAME]},{digest}"


def expand_runs(args: argparse.Namespace) -> list[RunArguments]:
    """Expands ``--array`` and ``--sweep`` to a list of runs; without them, returns the single run.

    Args:
        args: config_file, opts, resume, eval_only, ``array`` (a file or ""), ``sweep`` and
            ``only``.

    Raises:
        UserError: for a line or value that cannot be read, a run without config file, settings of
            ``only`` that belong to no run, and runs that do not differ.
    """
    if len(args.opts) % 2:
        raise UsageError(f"{args.opts[-1]!r} has no value, write KEY VALUE pairs")
    runs = _every_run(args)
    if missing := [run for run in runs if not run.config_file]:
        which = f" (run {runs.index(missing[0]) + 1} of {len(runs)})" if len(runs) > 1 else ""
        raise UsageError(f"--config-file FILE is required{which}, a yaml of configs/")
    if not args.array and not args.sweep:
        return runs
    _apply_only(args.only, runs)
    for number, run in enumerate(runs, 1):
        if "OUTPUT_DIR" in run.own | run.only:
            raise UsageError(
                f"run {number} of {len(runs)} sets its own OUTPUT_DIR: set one for the whole "
                "command, each run gets a folder in it"
            )
    _name_runs(runs, [_parse_sweep(text)[0] for text in args.sweep])
    names = [run.name for run in runs]
    if double := next((name for name in names if names.count(name) > 1), None):
        first, second = [i for i, name in enumerate(names, 1) if name == double][:2]
        raise UsageError(
            f"runs {first} and {second} of {len(runs)} are the same, both would be {double}"
        )
    for run in runs:
        run.opts += _opts(run.only)
    return runs
