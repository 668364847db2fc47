"""The command line of tools/results.py: prints a table of the results of several runs."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode

from contnet.engine.writers import METRICS_FILE, read_metrics
from contnet.evaluation.results import RESULTS_FILE, markdown_table, read_results
from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.classifier import ImageClassifier
from contnet.modeling.macs import build_meta_model, count_macs, count_parameters
from contnet.slurm.describe import describe_run, iterations_done, last_metrics
from contnet.slurm.jobs import live_states
from contnet.slurm.records import SUBMISSION_FILE, read_submissions
from contnet.utils.command import run_command
from contnet.utils.errors import UserError
from contnet.utils.records import read_bytes, warn_once
from contnet.utils.text import printable, say
from contnet.utils.yaml_text import parse_yaml

__all__ = ["build_parser", "collect_results", "group_by_seed", "main", "results_table"]

_CONFIG_FILE = "config.yaml"
_COUNTED = ("parameters_m", "macs_g", "macs_with_attention_g")


# --- the runs ------------------------------------------------------------------------------------


def _is_run(folder: Path) -> bool:
    names = (METRICS_FILE, RESULTS_FILE, _CONFIG_FILE, f"slurm/{SUBMISSION_FILE}")
    return any((folder / name).exists() for name in names)


def _find_runs(folder: Path) -> list[Path]:
    """Finds the runs submitted from a folder and those in it, or else the folder itself."""
    records = read_submissions(folder)
    submitted = {folder / name: None for each in records for name in each["runs"]}
    inside = {path: None for path in sorted(folder.iterdir()) if path.is_dir() and _is_run(path)}
    runs = list({**submitted, **inside})
    if not runs and _is_run(folder):
        return [folder]
    if not runs:
        raise UserError(f"{folder} is not a run folder and contains none")
    return runs


def _states(runs: Sequence[Path]) -> dict[Path, str]:
    """Returns the state of each run's live job; "" if it has none or SLURM does not answer."""
    states = {}
    for run in runs:
        records = read_submissions(run)
        try:
            states[run] = next(iter(live_states(records[-1]).values()), "") if records else ""
        except UserError:
            states[run] = ""
    return states


# --- one run -------------------------------------------------------------------------------------


def _scores(run: Path, metrics: Sequence[str]) -> dict[str, object]:
    """Returns iteration, metrics and warnings of the last evaluation."""
    records = read_results(str(run))
    if not records:
        return {}
    last = max(record["iteration"] or 0 for record in records)
    records = [record for record in records if (record["iteration"] or 0) == last]
    several = len({record["dataset"] for record in records}) > 1
    scores: dict[str, float | None] = {}
    warnings = dict.fromkeys(line for each in records for line in each.get("warnings", ()))
    for record in records:
        for task, values in record["metrics"].items():
            for name, value in (values if isinstance(values, dict) else {"": values}).items():
                key = "/".join(filter(None, (record["dataset"] if several else "", task, name)))
                wanted = key in metrics if metrics else "-" not in name
                if wanted and not isinstance(value, str):
                    scores[key] = value
    return {"iteration": last + 1, "metrics": scores, "warnings": list(warnings)}


def _read_settings(run: Path) -> dict:
    """Returns the values in a run's config.yaml; {} if the file is missing or damaged."""
    path = run / _CONFIG_FILE
    try:
        settings = parse_yaml((read_bytes(path) or b"{}").decode())
        if not isinstance(settings, dict):
            raise ValueError("it does not contain a config")
    except UserError as error:
        warn_once(f"{error}: it is skipped")
    except (ValueError, yaml.YAMLError) as error:
        reason = printable(" ".join(str(error).split()))
        warn_once(f"{path} cannot be read ({reason}): it is skipped")
    else:
        return settings
    return {}


def _row(run: Path, name: str, state: str, metrics: Sequence[str]) -> dict:
    loss = last_metrics(run).get("total_loss", math.nan)
    return {
        "run": name,
        "folder": str(run),
        "seed": _read_settings(run).get("SEED"),
        "state": describe_run(run, state),
        "loss": loss if math.isfinite(loss) else None,
        "iteration": iterations_done(run),
        "metrics": {},
        "warnings": [],
        **_scores(run, metrics),
    }


# --- costs ---------------------------------------------------------------------------------------


def _count(cfg: CfgNode) -> dict[str, float]:
    """Counts parameters in M and, for classifiers, G MACs for one image of CROP_TEST."""
    model = build_meta_model(cfg)
    counts = {"parameters_m": count_parameters(model)}
    if isinstance(model, ImageClassifier):
        size = cfg.INPUT.CLASSIFIER.CROP_TEST
        macs = count_macs(cfg, model, (size, size))
        counts["macs_g"] = macs["convolution"] + macs["linear"]
        counts["macs_with_attention_g"] = counts["macs_g"] + macs["attention"]
    return counts


def _read_config(run: Path) -> CfgNode | None:
    """Returns a run's full config; None if it is missing or not valid."""
    if not _read_settings(run):
        return None
    try:
        return load_checked_config(str(run / _CONFIG_FILE))
    except UserError as error:
        warn_once(f"{error}: it is skipped")
        return None


def _measured(run: Path) -> dict[str, list[float]]:
    """Returns the values in metrics.json by name."""
    values: dict[str, list[float]] = {}
    for line in read_metrics(run):
        for name, value in line.items():
            values.setdefault(name, []).append(value)
    return values


def _add_cost(row: dict, counted: dict[str, dict[str, float]]) -> None:
    """Adds parameters, MACs, speed and memory to a row; equal models are counted once."""
    run = Path(row["folder"])
    measured = _measured(run)
    memory = measured.get("gpu_memory_mb") or measured.get("host_memory_mb")
    if cfg := _read_config(run):
        key = f"{cfg.MODEL} {cfg.INPUT.CLASSIFIER.CROP_TEST}"
        if key not in counted:
            counted[key] = _count(cfg)
        row |= counted[key]
    time = statistics.median(measured.get("time", [0]))
    row["images_per_second"] = cfg.SOLVER.IMS_PER_BATCH / time if cfg and time > 0 else None
    row["memory_mb"] = max(memory) if memory else None


# --- rows ----------------------------------------------------------------------------------------


def collect_results(
    folders: Sequence[Path], metrics: Sequence[str] = (), cost: bool = False
) -> list[dict]:
    """Collects the results of runs, as dicts that can be written as JSON.

    Files that cannot be read are skipped with a warning.

    Args:
        folders: folders of runs, or folders that contain them, such as that of a sweep.
        metrics: metrics to include, such as ``bbox/AP``; by default all except those of single
            classes.
        cost: whether to include parameters, MACs of classifiers, speed and memory.

    Returns:
        A dict for each run with ``run`` (its name), ``folder``, ``seed`` (None before it has
        started), ``state``, ``loss`` (in the last line of metrics.json, not smoothed),
        ``iteration`` (of the last evaluation, otherwise the number of finished iterations),
        ``metrics``, and ``warnings`` about them. With ``cost`` also ``parameters_m``, ``macs_g``
        and ``macs_with_attention_g`` (if they can be counted), ``images_per_second`` in training
        and ``memory_mb`` (None if not measured).

    Raises:
        UserError: if a folder does not exist or contains no runs.
    """
    rows: dict[str, dict] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"the folder {folder} does not exist")
        runs = _find_runs(folder)
        states = _states(runs)
        for run in runs:
            name = run.name if len(folders) == 1 else str(run)
            rows[name] = _row(run, name, states[run], metrics)
    if cost:
        counted: dict[str, dict[str, float]] = {}
        for row in rows.values():
            _add_cost(row, counted)
    return list(rows.values())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _name_without_seed(run: Path) -> str:
    kept = [part for part in run.name.split(",") if not part.startswith("SEED=")]
    return ",".join(kept) or run.parent.name


def _merge(rows: Sequence[dict]) -> dict:
    """Merges the rows of runs that differ only in SEED."""
    states = dict.fromkeys(row["state"] for row in rows)
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    merged = {
        "run": _name_without_seed(Path(rows[0]["run"])),
        "seeds": [row["seed"] for row in rows],
        "state": "; ".join(states),
        "loss": _mean([row["loss"] for row in rows]),
        "iteration": min(row["iteration"] for row in rows),
        "metrics": {name: _mean([row["metrics"].get(name) for row in rows]) for name in names},
        "warnings": list(dict.fromkeys(line for row in rows for line in row["warnings"])),
        "runs": list(rows),
    }
    merged |= {key: rows[0][key] for key in _COUNTED if key in rows[0]}
    for key, combine in (("images_per_second", statistics.median), ("memory_mb", max)):
        if key in rows[0]:
            known = [row[key] for row in rows if row[key] is not None]
            merged[key] = combine(known) if known else None
    return merged


def group_by_seed(rows: Sequence[dict]) -> list[dict]:
    """Merges runs whose config.yaml differs only in SEED and OUTPUT_DIR into one row.

    Args:
        rows: rows from :func:`collect_results`.

    Returns:
        Rows with the mean loss and metrics, the lowest iteration, the median speed and the highest
        memory; ``seeds`` and ``runs`` list the seeds and rows of the merged runs. A run without
        config.yaml is not merged.
    """
    groups: dict[str, list[dict]] = {}
    for row in rows:
        settings = _read_settings(Path(row["folder"]))
        own = {key: settings[key] for key in settings if key not in ("SEED", "OUTPUT_DIR")}
        key = json.dumps(own, sort_keys=True, default=str) if own else row["folder"]
        groups.setdefault(key, []).append(row)
    merged = [_merge(group) for group in groups.values()]
    names = [row["run"] for row in merged]
    for row in merged:
        # Different configs can also have the same name.
        if names.count(row["run"]) > 1:
            row["run"] = "; ".join(each["run"] for each in row["runs"])
    return merged


# --- the table -----------------------------------------------------------------------------------


def _number(value: float | None, form: str, unknown: str) -> str:
    return unknown if value is None else format(value, form)


def _of_seeds(row: dict, value: Callable[[dict], float | None], form: str, unknown: str) -> str:
    """Formats a value; for several seeds, the mean, followed by each value in brackets."""
    shown = _number(value(row), form, unknown)
    if len(row.get("runs", ())) < 2:
        return shown
    return f"{shown} ({', '.join(_number(value(run), form, '-') for run in row['runs'])})"


def _cells(row: dict) -> dict[str, str | float]:
    iterations = dict.fromkeys(str(run["iteration"]) for run in row.get("runs", [row]))
    cells: dict[str, str | float] = {}
    if "seeds" in row:
        cells["seeds"] = ", ".join("-" if seed is None else str(seed) for seed in row["seeds"])
    cells["state"] = row["state"]
    cells["loss"] = _of_seeds(row, lambda run: run["loss"], ".4g", "")
    cells["iteration"] = ", ".join(iterations)
    for name in row["metrics"]:
        cells[name] = _of_seeds(row, lambda run, name=name: run["metrics"].get(name), ".2f", "n/a")
    if "parameters_m" in row:
        cells["parameters M"] = row["parameters_m"]
    if "macs_g" in row:
        both = f"{row['macs_g']:.2f} / {row['macs_with_attention_g']:.2f}"
        cells["MACs G, without / with attention"] = both
    if "memory_mb" in row:
        cells["images/s in training"] = _number(row["images_per_second"], ".1f", "not measured")
        cells["memory MB"] = _number(row["memory_mb"], ".0f", "not measured")
    return cells


def results_table(rows: Sequence[dict]) -> str:
    """Returns a Markdown table, followed by the warnings of each run.

    Args:
        rows: rows from :func:`collect_results` or :func:`group_by_seed`.
    """
    table = markdown_table("run", {row["run"]: _cells(row) for row in rows})
    warnings = [f"- {row['run']}: {line}" for row in rows for line in row["warnings"]]
    return "\n".join([table, "", "warnings:", *warnings] if warnings else [table])


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of tools/results.py."""
    parser = argparse.ArgumentParser(description="Prints a table of the results of several runs.")
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="folder of runs, or of a sweep"
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="metric to show, such as bbox/AP; may be repeated",
    )
    parser.add_argument(
        "--cost",
        action="store_true",
        help="also show parameters, MACs of classifiers, images/s in training and memory",
    )
    parser.add_argument(
        "--group-by-seed",
        action="store_true",
        help="one row for runs that differ only in SEED: means, and the value of each seed",
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    return parser


def _run(args: argparse.Namespace) -> None:
    rows = collect_results(args.folders, args.metric, args.cost)
    if args.group_by_seed:
        rows = group_by_seed(rows)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        say(*results_table(rows).split("\n"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/results.py and returns the exit status."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: _run(args))
