"""Sections from the records of a run: curves, metrics, config differences.

They need no data set, images or weights, so training can refresh them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode

from contnet.config.differences import read_values
from contnet.config.keys import default_config
from contnet.evaluation.metrics import MAIN_METRICS
from contnet.evaluation.protocol import SEE_WARNINGS
from contnet.evaluation.results import split_metrics
from contnet.report.curves import Line, Plot, by_iteration, running_median, series
from contnet.report.page import Curves, Notes, Section, Table, Tiles
from contnet.utils.text import printable

__all__ = ["RunRecord", "curve_sections", "difference_sections", "result_sections"]

_TILES = 4  # maximum number of metrics in large print
_SHOWN_LINES = 6  # lines of a plot that are visible at first
_MOST_POINTS = 60_000  # maximum per page
_MOST_ROWS = 1000  # maximum in the table of values
# The paper's columns of a detector come first.
_ORDER = ("AP", "APs", "APm", "APl", "AP50", "AP75", "IoU", "top1", "top5")
_LOSS = re.compile(r"(.*/)?(total_loss|loss_.*)")
_TIMES = ("time", "data_time", "rank_data_time")
_MEMORY = ("gpu_memory_mb", "host_memory_mb")
# Titles and y-axes of the keys of metrics.json without a slash.
_PLAIN = {
    "loss": ("Losses", "loss"),
    "lr": ("Learning rate", "learning rate"),
    "time": ("Time per iteration", "seconds"),
    "memory": ("Peak memory", "MB"),
}
# Keys without a curve.
_LEFT_OUT = {"iteration", "images_seen", "eta_seconds"}


@dataclass(frozen=True)
class RunRecord:
    """The records in a run's folder.

    Attributes:
        name: name of the run on the page.
        metrics: the lines of metrics.json.
        results: the records of results.json.
        config: the text of config.yaml; "" if there is none.
    """

    name: str
    metrics: Sequence[Mapping[str, float]]
    results: Sequence[Mapping]
    config: str = ""


# --- curves --------------------------------------------------------------------------------------


def _group(key: str) -> tuple[str, str]:
    """Returns the title and y-axis of the plot that a key of metrics.json belongs to."""
    if _LOSS.fullmatch(key):
        return _PLAIN["loss"]
    if key == "lr":
        return _PLAIN["lr"]
    if key in _TIMES:
        return _PLAIN["time"]
    if key in _MEMORY:
        return _PLAIN["memory"]
    prefix, slash, name = key.rpartition("/")
    if not slash:
        return key, key
    if "-" in name:
        return f"{prefix}, by class", "%"
    if re.match(r"AR(@|[sml]|\d|$)", name):
        return f"{prefix}, average recall", "%"
    number = f"{prefix}, numbers" if name.startswith("num_") else prefix
    return number, "%" if any(prefix.endswith(each.split("/")[0]) for each in MAIN_METRICS) else ""


def _place(title: str) -> tuple:
    """Returns the sort key of a plot: losses, metrics, the rest, then learning rate and costs."""
    titles = [title for title, _ in _PLAIN.values()]
    if title == titles[0]:
        return 0, 0
    if title in titles:
        return 3, titles.index(title)
    tasks = {each.split("/")[0] for each in MAIN_METRICS}
    head = title.split(",")[0].rpartition("/")[2].removesuffix("_TTA")
    return (1 if head in tasks else 2), title


def _rank(key: str) -> tuple:
    name = key.rpartition("/")[2]
    known = _ORDER.index(name) if name in _ORDER else len(_ORDER)
    return key != "total_loss", key != "time", known, key


def _lines(
    rows: Mapping[str, Mapping[int, Mapping[str, float]]], keys: Sequence[str]
) -> list[Line]:
    """Returns a line for each key and run."""
    lines = []
    for key in keys:
        for run, each in rows.items():
            x, y = series(each, key)
            if not x:
                continue
            if _LOSS.fullmatch(key):
                y = running_median(y)
            label = key if len(rows) == 1 else f"{run}: {key}"
            lines.append(Line(label, x, y, len(lines) < max(_SHOWN_LINES, len(rows))))
    return lines


def _plots(rows: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[Plot]:
    keys = {key for each in rows.values() for row in each.values() for key in row}
    groups: dict[tuple[str, str], list[str]] = {}
    for key in sorted(keys - _LEFT_OUT, key=_rank):
        groups.setdefault(_group(key), []).append(key)
    plots = []
    for (title, unit), names in sorted(groups.items(), key=lambda each: _place(each[0][0])):
        if lines := _lines(rows, names):
            caption = "Running medians over a twentieth of the run." if unit == "loss" else ""
            plots.append(Plot(printable(title), "iteration", unit or "value", lines, caption))
    return plots


def _listed(
    rows: Mapping[str, Mapping[int, Mapping[str, float]]],
) -> list[tuple[object, Mapping[str, float]]]:
    """Returns the table's rows; if there are too many, evenly spaced ones and all evaluations."""
    listed = []
    for run, each in rows.items():
        step = math.ceil(len(each) / (_MOST_ROWS / len(rows)))
        for number, (iteration, row) in enumerate(each.items()):
            evaluated = any(key.endswith(MAIN_METRICS) for key in row)
            if number % step == 0 or number == len(each) - 1 or evaluated:
                place = iteration if len(rows) == 1 else f"{run}: {iteration}"
                listed.append((place, row))
    return listed


def curve_sections(runs: Sequence[RunRecord]) -> list[Section]:
    """Returns curves of all keys of metrics.json; those of several runs share a plot."""
    rows = {run.name: by_iteration(run.metrics) for run in runs}
    if not any(rows.values()):
        return [Notes("Curves", ["metrics.json is missing or empty: there are no curves."])]
    plots = _plots(rows)
    lines = sum(len(plot.lines) for plot in plots)
    most = max(min(1000, _MOST_POINTS // max(lines, 1)), 20)
    keys = {key for each in rows.values() for row in each.values() for key in row}
    # Metrics by class have a separate table.
    columns = [key for key in sorted(keys - _LEFT_OUT, key=_rank) if "-" not in key]
    return [Curves("Curves", plots, ["iteration", *columns], _listed(rows), most)]


# --- metrics -------------------------------------------------------------------------------------


def _main_value(record: Mapping, wanted: str) -> float:
    """Returns the metric that decides which record is best; -inf if the record has none."""
    names = [wanted, wanted.removeprefix(f"{record['dataset']}/")] if wanted else []
    for name in [*names, *MAIN_METRICS]:
        task, _, metric = name.partition("/")
        values = record["metrics"].get(task)
        value = values.get(metric) if isinstance(values, Mapping) else None
        if isinstance(value, (int, float)):
            return value
    return -math.inf


def _chosen(run: RunRecord, dataset: str) -> dict[str, Mapping]:
    """Returns a run's final and best evaluation on a data set; one entry if they are the same."""
    records = [each for each in run.results if each["dataset"] == dataset and each["metrics"]]
    if not records:
        return {}
    wanted = str(_config_values(run).get("TEST.BEST_METRIC", ""))
    final = max(records, key=lambda each: each["iteration"] or 0)
    best = max(records, key=lambda each: _main_value(each, wanted))
    return {"final and best": final} if best is final else {"final": final, "best": best}


def _cells(record: Mapping, table: int) -> dict[str, float]:
    """Returns the cells of one of a record's tables, by column."""
    tasks = split_metrics(record["metrics"])[table]
    return {f"{task} {name}": v for task, values in tasks.items() for name, v in values.items()}


def _columns(cells: Iterable[Mapping[str, object]]) -> list[str]:
    """Returns the columns of all rows, grouped by task, with the paper's columns first."""
    names = dict.fromkeys(name for each in cells for name in each)
    tasks = list(dict.fromkeys(name.split(" ")[0] for name in names))

    def place(name: str) -> tuple:
        task, _, metric = name.partition(" ")
        return tasks.index(task), _ORDER.index(metric) if metric in _ORDER else len(_ORDER)

    return sorted(names, key=place)


def _shown(value: object) -> object:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return f"{value:.2f}"
    return "n/a" if value is None or isinstance(value, float) else value


def _metrics_table(heading: str, records: Mapping[str, Mapping], table: int) -> list[Table]:
    rows = {name: _cells(record, table) for name, record in records.items()}
    columns = _columns(rows.values())
    if not columns:
        return []
    cells = [
        (
            name,
            [
                (records[name]["iteration"] or 0) + 1,
                *(_shown(row[key]) if key in row else None for key in columns),
            ],
        )
        for name, row in rows.items()
    ]
    return [Table(heading, ["evaluation", "iterations", *columns], cells)]


def _class_table(dataset: str, records: Mapping[str, Mapping]) -> list[Table]:
    tables = {name: split_metrics(record["metrics"])[2] for name, record in records.items()}
    classes = dict.fromkeys(name for table in tables.values() for name in table)
    columns = [
        (run, metric)
        for run, table in tables.items()
        for metric in dict.fromkeys(key for row in table.values() for key in row)
    ]
    if not columns:
        return []
    rows = [
        (name, [_shown(tables[run].get(name, {}).get(metric)) for run, metric in columns])
        for name in classes
    ]
    several = len(tables) > 1
    headings = [f"{metric} ({run})" if several else metric for run, metric in columns]
    return [Table(f"By class: {dataset}", ["class", *headings], rows)]


def _tiles(run: RunRecord) -> list[Section]:
    """Returns the first main metrics of the last evaluation, and the last loss."""
    final = max(run.results, key=lambda each: each["iteration"] or 0, default=None)
    cells = _cells(final, 0) if final else {}
    numbers = {name: _shown(cells[name]) for name in _columns([cells])[:_TILES]}
    _, losses = series(by_iteration(run.metrics), "total_loss")
    if losses:
        numbers["last loss"] = f"{losses[-1]:.3f}"
    return [Tiles(numbers)] if numbers else []


def _warnings(records: Mapping[str, Mapping]) -> list[str]:
    """Returns warnings about the metrics of evaluations on one data set, one line each."""
    lines = [line for each in records.values() for line in each.get("warnings", ())]
    for name, record in records.items():
        others = [line for line in record.get("deviations", ()) if line != SEE_WARNINGS]
        lines += [f"{name}: not a standard evaluation, {line}" for line in others]
    protocols = [record.get("protocol", {}) for record in records.values()]
    if len({each.get("dataset_sha256") for each in protocols} - {None}) > 1:
        lines.append("these evaluations used different versions of the data set")
    return list(dict.fromkeys(lines))


def result_sections(runs: Sequence[RunRecord]) -> list[Section]:
    """Returns each run's final and best evaluation on each data set, and their warnings."""
    sections = _tiles(runs[0]) if len(runs) == 1 else []
    for dataset in dict.fromkeys(each["dataset"] for run in runs for each in run.results):
        records = {}
        for run in runs:
            for which, record in _chosen(run, dataset).items():
                records[which if len(runs) == 1 else f"{run.name}, {which}"] = record
        sections += _metrics_table(f"Results: {dataset}", records, 0)
        sections += _metrics_table(f"Average recall: {dataset}", records, 1)
        sections += _class_table(dataset, records)
        warnings = _warnings(records)
        if warnings:
            sections.append(Notes(f"Warnings: {dataset}", warnings))
    if not any(run.results for run in runs):
        sections.append(Notes("Results", ["results.json has no evaluation."]))
    return sections


# --- configs -------------------------------------------------------------------------------------


def _config_values(run: RunRecord, cfg: CfgNode | None = None) -> dict[str, object]:
    """Returns the values of a run's config by key; {} if it is missing or cannot be read."""
    try:
        return read_values(run.config, cfg or default_config()) if run.config else {}
    except ValueError:
        return {}


def difference_sections(runs: Sequence[RunRecord]) -> list[Section]:
    """Returns a table of the config keys whose values differ between runs."""
    cfg = default_config()
    values = {run.name: _config_values(run, cfg) for run in runs}
    sections: list[Section] = []
    if missing := [name for name, each in values.items() if not each]:
        names = ", ".join(missing)
        sections.append(Notes("Configs", [f"config.yaml is missing or cannot be read: {names}."]))
    known = {name: each for name, each in values.items() if each}
    if len(known) < 2:
        return sections
    keys = sorted({key for each in known.values() for key in each} - {"OUTPUT_DIR"})
    rows = []
    for key in keys:
        cells = [str(each.get(key, "not set")) for each in known.values()]
        if len(set(cells)) > 1:
            rows.append((key, ["''" if cell == "" else cell for cell in cells]))
    if not rows:
        sections.append(Notes("Config differences", ["The configs differ only in OUTPUT_DIR."]))
    else:
        sections.append(Table("Config differences", ["key", *known], rows))
    return sections
