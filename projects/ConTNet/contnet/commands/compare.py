"""Trains several classifiers under one recipe and puts what came out into one table.

Every network gets the same config, data, seeds and processes; its name and its folder alone differ,
and what ``--only`` gives one of them, which the table tells. Each training is a process of its own
that runs train_net.py, so that its memory can be told.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from contnet.commands.parsing import check_positive
from contnet.engine.writers import METRICS_FILE
from contnet.evaluation.results import read_results
from contnet.launch.arguments import config_parser, configure
from contnet.modeling.macs import build_meta_model, count_macs, count_parameters
from contnet.utils.errors import UserError, print_error
from contnet.utils.files import atomic_write

__all__ = ["compare", "main", "table"]

_EPILOG = """\
example:
  compare_classifiers.py --config-file configs/imagenet/Base-plain.yaml \\
      --networks contnet_s,resnet18 --output output/compare MODEL.CLASSIFIER.NUM_CLASSES 10
  ... --only contnet_s "MODEL.CONTNET.RELATIVE True" --only resnet18 "SOLVER.BASE_LR 0.01"
"""
# Keys that the tool's own options set.
_OPTIONS = {
    "MODEL.CLASSIFIER.NAME": "--networks",
    "SEED": "--seeds",
    "OUTPUT_DIR": "--output",
}
_KEYS = {"network", "seed", "memory_mb"}
_CURE = "remove it, and the finished trainings are read again"
_REPOSITORY = Path(__file__).resolve().parents[4]


def _train(options: Sequence[str], folder: Path, num_gpus: int) -> float | None:
    """Trains, or goes on with, one network; the largest process's memory in MB.

    Returns:
        None where the training had been finished before.
    """
    if (folder / "model_final.pth").exists():
        return None
    command = [sys.executable, str(_REPOSITORY / "train_net.py"), *options]
    if (folder / "last_checkpoint").exists():
        command.append("--resume")
    process = subprocess.Popen([*command, "--num-gpus", str(num_gpus)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"the training in {folder} failed, see the lines above")
    return usage.ru_maxrss / 1024


def _flat(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _check_settings(cfg: CfgNode, folder: Path) -> None:
    """Refuses to keep a training, or to go on with one, that had other settings."""
    file = folder / "config.yaml"
    if not file.exists() or not any(folder.glob("model_*.pth")):
        return
    was = dict(_flat(yaml.safe_load(file.read_text())))
    now = dict(_flat(yaml.safe_load(cfg.dump())))
    if changed := [key for key in {**now, **was} if now.get(key) != was.get(key)]:
        raise UserError(
            f"{folder} has a training with other settings ({', '.join(changed[:3])}): choose "
            "another --output, or remove it"
        )


def _figures(folder: Path, batch: int) -> dict:
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    times = [line["time"] for line in lines if line.get("time")]
    memory = [line["gpu_memory_mb"] for line in lines if "gpu_memory_mb" in line]
    metrics = read_results(str(folder))[-1]["metrics"]["classification"]
    return {
        "top1": metrics["top1"],
        "images_per_second": batch / statistics.median(times) if times else None,
        "memory_mb": max(memory) if memory else None,
    }


@dataclass(frozen=True)
class _Plan:
    """A network to be trained with one seed: by which command line, and what that means."""

    network: str
    seed: int
    folder: Path
    options: list[str]
    cfg: CfgNode


def _plan(args: argparse.Namespace, network: str, seed: int) -> _Plan:
    folder = (args.output / f"{network}_seed{seed}").resolve()
    own = ["MODEL.CLASSIFIER.NAME", network, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
    opts = [*args.opts, *shlex.split(args.only.get(network, "")), *own]
    cfg = configure(argparse.Namespace(**{**vars(args), "opts": opts}))
    cfg = DefaultTrainer.auto_scale_workers(cfg, args.num_gpus)
    _check_settings(cfg, folder)
    return _Plan(network, seed, folder, ["--config-file", args.config_file, *opts], cfg)


def _run(args: argparse.Namespace, plan: _Plan) -> dict:
    """One row of the table."""
    cfg = plan.cfg
    memory = _train(plan.options, plan.folder, args.num_gpus)
    row = {
        "network": plan.network,
        "only": args.only.get(plan.network, ""),
        "seed": plan.seed,
        **_figures(plan.folder, cfg.SOLVER.IMS_PER_BATCH),
    }
    if row["memory_mb"] is None:
        row["memory_mb"] = memory
    model = build_meta_model(cfg)
    size = cfg.INPUT.CLASSIFIER.CROP_TEST
    operations = count_macs(cfg, model, (size, size))
    attention = operations.pop("attention", 0.0)
    kept = operations["convolution"] + operations["linear"]
    return {
        **row,
        "parameters_m": count_parameters(model),
        "operations_g": kept,
        "operations_with_attention_g": kept + attention,
    }


def _number(value: float | None, digits: int) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def table(rows: Sequence[dict]) -> str:
    """A Markdown table of networks, their seeds together.

    Args:
        rows: of :func:`compare`.
    """
    lines = [
        "| network | top-1, mean | of each seed | parameters M | G multiply-adds, "
        "without / with attention | images/s in training | memory MB |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        speeds = [row["images_per_second"] for row in own if row["images_per_second"]]
        memories = [row["memory_mb"] for row in own if row["memory_mb"]]
        only = own[0].get("only")
        cells = [
            f"{network} ({only})" if only else network,
            _number(statistics.mean(row["top1"] for row in own), 2),
            ", ".join(f"{row['top1']:.2f} ({row['seed']})" for row in own),
            _number(own[0]["parameters_m"], 2),
            f"{own[0]['operations_g']:.2f} / {own[0]['operations_with_attention_g']:.2f}",
            _number(statistics.median(speeds) if speeds else None, 1),
            _number(max(memories) if memories else None, 0),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _read_rows(file: Path) -> list[dict]:
    """The rows of earlier calls."""
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): {_CURE}") from error
    if not isinstance(rows, list) or not all(
        isinstance(r, dict) and r.keys() >= _KEYS for r in rows
    ):
        raise UserError(f"{file} does not hold rows of a comparison: {_CURE}")
    return rows


def compare(args: argparse.Namespace) -> list[dict]:
    """Trains every network with every seed; finished trainings are kept.

    Args:
        args: ``config_file``, ``opts``, ``networks``, ``seeds``, ``num_gpus``, ``output``, and
            ``only``: overrides by network, as text.

    Returns:
        A row for each network and seed, which is also in ``<output>/compare.json`` with the rows
        of earlier calls.

    Raises:
        UserError: if a training fails; before the first one, for a mistake in the settings of any,
            or where one was begun before with others.
    """
    file = args.output / "compare.json"
    old = _read_rows(file)
    asked = [(network, seed) for network in args.networks for seed in args.seeds]
    plans = [_plan(args, *each) for each in asked]  # all of them, before the first trains
    others = [row for row in old if (row["network"], row["seed"]) not in asked]
    rows = []
    for plan in plans:
        row = _run(args, plan)
        if row["memory_mb"] is None:  # finished before: what was measured then
            known = [r for r in old if (r["network"], r["seed"]) == (plan.network, plan.seed)]
            row["memory_mb"] = known[0]["memory_mb"] if known else None
        rows.append(row)
        with atomic_write(file, "w") as out:
            json.dump([*others, *rows], out, indent=1)
    return rows


def _networks(text: str) -> list[str]:
    names = text.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} must be names with commas between, each once")
    return names


def _seeds(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be whole numbers from 0 with commas between, each once"
        )
    return [int(word) for word in words]


def _check_own(opts: Sequence[str]) -> None:
    """Refuses keys that differ from run to run anyway."""
    for key, option in _OPTIONS.items():
        if key in opts[::2]:
            raise UserError(f"{key} has no effect here, it is what {option} gives: leave it out")


def _check(args: argparse.Namespace) -> None:
    args.only = dict(args.only)
    if strange := [name for name in args.only if name not in args.networks]:
        raise UserError(f"--only {strange[0]} is not one of --networks {','.join(args.networks)}")
    for name, only in args.only.items():
        try:
            words = shlex.split(only)
        except ValueError as error:
            raise UserError(f"--only {name} {only!r}: {error}") from error
        if len(words) % 2:
            raise UserError(f"--only {name} {only!r} is not in pairs KEY VALUE")
        _check_own(words)
    _check_own(args.opts)
    check_positive(args, "num_gpus")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of tools/compare_classifiers.py."""
    parser = config_parser(__doc__.splitlines()[0], _EPILOG)
    parser.add_argument(
        "--networks",
        type=_networks,
        required=True,
        metavar="NAME,NAME",
        help="ConTNets, or names of timm",
    )
    parser.add_argument("--seeds", type=_seeds, default=[1], metavar="N,N", help="(default 1)")
    parser.add_argument(
        "--only",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "'KEY VALUE ...'"),
        help="settings of one of the networks alone",
    )
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="as of train_net.py")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="gets a folder for each run"
    )
    try:
        args = parser.parse_intermixed_args(argv)
        _check(args)
        args.output.mkdir(parents=True, exist_ok=True)
        rows = compare(args)
    except UserError as error:
        print_error(error)
        return 1
    print(table(rows))
    return 0
