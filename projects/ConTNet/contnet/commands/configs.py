"""The command line of tools/configs.py: lists, shows and compares configs, and explains keys."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from tabulate import tabulate

from contnet.config.comments import find_definition
from contnet.config.differences import differences, read_values, show
from contnet.config.keys import default_config
from contnet.config.nodes import flatten, get_value
from contnet.config.shipped import SHIPPED_CONFIGS
from contnet.launch.legal_values import legal_values
from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.fpn import bottom_up_name
from contnet.modeling.pspnet import SEGMENTORS
from contnet.utils.command import EXIT_STATUSES, run_command
from contnet.utils.errors import UsageError, UserError
from contnet.utils.text import nearest, say

__all__ = [
    "backbone_of",
    "build_parser",
    "changed_values",
    "describe_config",
    "explain_key",
    "list_configs",
    "main",
    "parse_arguments",
    "system_of",
]

_EPILOG = """\
examples:
  configs.py list retinanet 3x
  configs.py show configs/faster_rcnn_contm.yaml --changed SOLVER.MAX_ITER 180000
  configs.py diff configs/fcos_contm.yaml configs/fcos_plain_contm.yaml
  configs.py explain MODEL.CONTNET.TAPS
"""
_COLUMNS = ("config", "system", "backbone", "schedule", "data set")


# --- the list ------------------------------------------------------------------------------------


def system_of(cfg: CfgNode) -> str:
    """Returns the system of a config, such as "Mask R-CNN"; for extensions, the model's name."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture == "GeneralizedRCNN":
        return "Mask R-CNN" if cfg.MODEL.MASK_ON else "Faster R-CNN"
    if architecture in SEGMENTORS and cfg.MODEL.SEM_SEG_HEAD.NAME == "PSPHead":
        return "PSPNet"
    return "classifier" if architecture == "ImageClassifier" else architecture


def backbone_of(cfg: CfgNode) -> str:
    """Returns the network of a config, such as "contnet_m" or "resnet50"."""
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        return cfg.MODEL.CLASSIFIER.NAME
    name = bottom_up_name(cfg.MODEL.BACKBONE.NAME)
    depth = {"contnet": cfg.MODEL.CONTNET.VARIANT, "resnet": f"resnet{cfg.MODEL.RESNETS.DEPTH}"}
    return depth.get(name, name)


def _schedule(cfg: CfgNode) -> str:
    solver = cfg.SOLVER
    length = f"{solver.MAX_EPOCHS:g} epochs" if solver.MAX_EPOCHS else f"{solver.MAX_ITER} it."
    return f"{length}, {solver.IMS_PER_BATCH} images"


def describe_config(path: Path) -> tuple[str, ...]:
    """Returns the system, backbone, schedule and training sets of a config file."""
    cfg = load_checked_config(str(path))
    datasets = ", ".join(cfg.DATASETS.TRAIN) or "-"
    return system_of(cfg), backbone_of(cfg), _schedule(cfg), datasets


def _shown(path: Path) -> str:
    """Returns a path as the user would type it."""
    if path.is_relative_to(SHIPPED_CONFIGS):
        return str(Path("configs", path.relative_to(SHIPPED_CONFIGS)))
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def list_configs(
    words: Sequence[str] = (), folder: Path = SHIPPED_CONFIGS
) -> list[tuple[str, ...]]:
    """Lists the configs in a folder, except base configs (``Base*``).

    Args:
        words: words that the path or a column must contain; case is ignored.
        folder: folder that is searched recursively.

    Returns:
        A row for each config: path, system, backbone, schedule, training sets.

    Raises:
        UserError: if no config is found.
    """
    rows = []
    for path in sorted(folder.rglob("*.yaml")):
        if not path.name.startswith("Base"):
            row = _shown(path), *describe_config(path)
            text = " ".join((str(path.relative_to(folder)), *row[1:])).lower()
            if all(word.lower() in text for word in words):
                rows.append(row)
    if not rows:
        what = f" with {' and '.join(map(repr, words))}" if words else ""
        raise UserError(f"{folder} has no config{what}: give fewer words")
    return rows


# --- show and diff -------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Dumper without aliases: a list that two keys share is written twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _nested(values: Mapping[str, object]) -> dict:
    """Converts values by dotted key to nested mappings."""
    root: dict = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        node = root
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return root


def changed_values(cfg: CfgNode) -> dict[str, object]:
    """Returns the values of a config that differ from the defaults, by dotted key."""
    defaults = read_values("{}", cfg)
    return {key: now for key, (_, now) in differences(defaults, cfg).items()}


def _show(args: argparse.Namespace) -> None:
    cfg = load_checked_config(args.config, args.opts)
    values = changed_values(cfg) if args.changed else read_values(cfg.dump(), cfg)
    say(*yaml.dump(_nested(values), Dumper=_Dumper).rstrip("\n").split("\n"))


def _diff(args: argparse.Namespace) -> None:
    before, now = map(load_checked_config, (args.config, args.other))
    different = differences(read_values(before.dump(), now), now)
    say(*(show(key, *both) for key, both in sorted(different.items())))
    print(f"keys that differ: {len(different)}")


# --- keys ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _defaults() -> CfgNode:
    return default_config()


def _check_key(key: str) -> None:
    known = dict(flatten(_defaults(), _defaults()))
    parts = [name.split(".") for name in known]
    groups = {".".join(each[:depth]) for each in parts for depth in range(1, len(each))}
    if key not in known and key not in groups:
        near = nearest(key, [*known, *groups])
        raise UsageError(f"the key {key} does not exist, the nearest is {near}")


def _source(key: str) -> str:
    """Returns the project, file and line in which a key is defined."""
    found = find_definition(key)
    path = Path(found.file)
    owner = "this project" if found.ours else "Detectron2"
    return f"{owner}, {os.path.join(*path.parts[-3:])}, line {found.line}"


def _facts(facts: Mapping[str, str]) -> list[str]:
    return [
        line
        for name, text in facts.items()
        for line in textwrap.wrap(
            text, 96, initial_indent=f"  {name + ':':9}", subsequent_indent=" " * 11
        )
    ]


def explain_key(key: str) -> list[str]:
    """Returns lines with a key's meaning, default and legal values, or with a group's keys.

    Raises:
        UsageError: if the key does not exist.
    """
    _check_key(key)
    value = get_value(_defaults(), key)
    comment = find_definition(key).comment
    lines = [key, *textwrap.wrap(comment or "(its definition has no comment)", 96)]
    lines = [lines[0], *(f"  {line}" for line in lines[1:])]
    facts = {"defined": _source(key)}
    if isinstance(value, CfgNode):
        below = (f"{name} {each!r}" for name, each in flatten(value, value))
        return [*lines, *_facts(facts), "  keys and defaults:", *(f"    {each}" for each in below)]
    return [*lines, *_facts({"default": repr(value), "legal": legal_values(key, value), **facts})]


# --- the command ---------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of tools/configs.py."""
    parser = argparse.ArgumentParser(
        description="Lists, resolves and compares configs, and explains their keys.",
        epilog=f"{_EPILOG}\n{EXIT_STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    forms = parser.add_subparsers(dest="form", required=True, metavar="{list,show,diff,explain}")
    form = forms.add_parser("list", help="list the configs", allow_abbrev=False)
    form.add_argument(
        "words", nargs="*", metavar="WORD", help="only configs whose row contains all these words"
    )
    form.set_defaults(run=_list)
    form = forms.add_parser(
        "show", help="print a config with its _BASE_ and overrides, as yaml", allow_abbrev=False
    )
    form.add_argument("config", metavar="FILE", help="a yaml of configs/, or of a run")
    form.add_argument(
        "--changed", action="store_true", help="only keys that differ from the defaults"
    )
    form.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides, in pairs")
    form.set_defaults(run=_show)
    form = forms.add_parser(
        "diff", help="print the keys that differ between two configs", allow_abbrev=False
    )
    form.add_argument("config", metavar="FILE", help="a yaml of configs/, or of a run")
    form.add_argument("other", metavar="OTHER", help="another one")
    form.set_defaults(run=_diff)
    form = forms.add_parser(
        "explain", help="print what keys mean, their defaults and legal values", allow_abbrev=False
    )
    form.add_argument(
        "keys", nargs="+", metavar="KEY", help="a key or a group of keys, such as SOLVER.EMA"
    )
    form.set_defaults(run=_explain)
    return parser


def _list(args: argparse.Namespace) -> None:
    say(*tabulate(list_configs(args.words), headers=_COLUMNS, tablefmt="plain").split("\n"))


def _explain(args: argparse.Namespace) -> None:
    for number, key in enumerate(args.keys):
        say(*([""] if number else []), *explain_key(key))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line (``sys.argv`` by default)."""
    parser = build_parser()
    # parse_intermixed_args, which accepts overrides after options, does not support subparsers.
    args, rest = parser.parse_known_args(argv)
    if rest and (args.form != "show" or rest[0].startswith("-")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.opts += rest
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/configs.py and returns the exit status."""
    args = parse_arguments(argv)
    return run_command(lambda: args.run(args))
