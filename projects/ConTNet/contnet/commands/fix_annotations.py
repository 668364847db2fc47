"""Writes a fixed copy of an annotation file, for ``tools/doctor.py --fix``."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode

from contnet.data.datasets.annotation_files import check_form, read_json
from contnet.data.datasets.coco import CocoSource
from contnet.data.datasets.register import find_source
from contnet.data.findings import ERROR, Findings
from contnet.data.validation.coco import check_instances
from contnet.data.validation.examine import dataset_use
from contnet.data.validation.fixing import fix_content
from contnet.utils.errors import UsageError, UserError
from contnet.utils.files import atomic_write
from contnet.utils.text import plural, say

__all__ = ["fix_annotations"]


class _Mended(NamedTuple):
    """A data set whose annotations were fixed in memory.

    Attributes:
        name: name of the data set.
        source: its source.
        content: the fixed annotations.
        done: number of fixes by description.
    """

    name: str
    source: CocoSource
    content: dict
    done: Counter


def _find_sources(cfg: CfgNode, name: str | None) -> dict[str, CocoSource]:
    """Finds the data sets in COCO format, or the one with this name."""
    names = list(dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]))
    sources = {each: find_source(each) for each in names}
    sources = {key: source for key, source in sources.items() if isinstance(source, CocoSource)}
    if not sources:
        raise UsageError("--fix requires a data set in COCO format in DATASETS.TRAIN or TEST")
    if name is None:
        return sources
    if name not in sources:
        raise UsageError(
            f"--dataset {name} is not a data set in COCO format in DATASETS.TRAIN or TEST (these "
            f"are: {', '.join(sources)})"
        )
    return {name: sources[name]}


def _fix_one(cfg: CfgNode, sources: dict[str, CocoSource]) -> _Mended:
    """Fixes the only data set, or the only one that needs fixing."""
    if len({source.json_file for source in sources.values()}) == 1:
        sources = dict([next(iter(sources.items()))])
    needy = None
    for name, source in sources.items():
        content, done = _read(source)
        done += fix_content(content, source.image_root, cfg.MODEL.MASK_ON)
        if needy and done:
            raise UsageError(
                f"--fix: {needy.name} and {name} both need fixing: choose one with --dataset NAME"
            )
        if done or len(sources) == 1:
            needy = _Mended(name, source, content, done)
    if needy is None:
        raise UserError(f"--fix: there is nothing to fix in {' or '.join(sources)}")
    return needy


def _check_target(file: Path) -> None:
    """Raises UserError if the output file exists or its folder does not."""
    if os.path.lexists(file):
        raise UserError(f"--fix {file}: it already exists, give a new file")
    if not file.parent.is_dir():
        raise UserError(f"--fix {file}: the folder {file.parent.absolute()} does not exist")


def _read(source: CocoSource) -> tuple[dict, Counter]:
    """Reads a file as far as possible; also counts the errors in its text that were accepted.

    Raises:
        UserError: if the file does not have the structure of COCO instances.
    """
    content, accepted = read_json(source.json_file, lenient=True)
    done = Counter(f"the file {what}: plain UTF-8" for what in accepted)
    check_form(content, source.json_file)
    return content, done


def _remaining(cfg: CfgNode, name: str, content: dict) -> list[str]:
    """Returns the errors that a fixed file still has."""
    findings = Findings()
    try:
        check_instances(content, dataset_use(cfg, name), findings)
    except UserError as error:
        return [str(error)]
    return findings.lines(ERROR)


def fix_annotations(cfg: CfgNode, file: Path, name: str | None) -> bool:
    """Writes a fixed copy of a data set's annotation file and prints what was fixed.

    Args:
        cfg: config whose data sets are registered.
        file: output file, which must not exist.
        name: name of the data set; None for the only one that needs fixing.

    Returns:
        Whether the doctor finds no more errors in the copy.

    Raises:
        UserError: if nothing can be written.
    """
    _check_target(file)
    try:
        name, source, content, done = _fix_one(cfg, _find_sources(cfg, name))
        errors = _remaining(cfg, name, content)
        with atomic_write(file, "w") as stream:
            json.dump(content, stream)  # ASCII, even if names are not
    except RecursionError as error:
        raise UserError("--fix: the file is nested too deeply, remove the nested lists") from error
    say(f"data set {name}: {source.json_file} -> {file}")
    for what, number in done.items():
        say(f"  fixed {number:8}  {what}")
    if not done:
        say("  nothing to fix")
    for line in errors:
        say(f"  ERROR  {line}")
    say(
        f"{plural(len(errors), 'error')} left, which you must fix yourself"
        if errors
        else f"to use it, put [{name}, {file}, {source.image_root}] in DATASETS.REGISTER"
    )
    return not errors
