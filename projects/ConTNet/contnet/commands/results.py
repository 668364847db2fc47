"""What tools/results.py prints: a table of the results of several runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from contnet.engine.writers import METRICS_FILE
from contnet.evaluation.results import RESULTS_FILE, markdown_table, read_results
from contnet.slurm.describe import describe_run, iterations_done, last_metrics
from contnet.slurm.jobs import live_states
from contnet.slurm.records import SUBMISSION_FILE, read_submissions
from contnet.utils.errors import UserError, print_error

__all__ = ["build_parser", "main", "results_table"]


def _is_run(folder: Path) -> bool:
    names = (METRICS_FILE, RESULTS_FILE, "config.yaml", f"slurm/{SUBMISSION_FILE}")
    return any((folder / name).exists() for name in names)


def _find_runs(folder: Path) -> list[Path]:
    """The runs that were submitted from a folder, or those in it, or itself."""
    records = read_submissions(folder)
    submitted = {folder / name: None for each in records for name in each["runs"]}
    inside = {path: None for path in sorted(folder.iterdir()) if path.is_dir() and _is_run(path)}
    runs = list({**submitted, **inside})
    if not runs and _is_run(folder):
        return [folder]
    if not runs:
        raise UserError(f"{folder} is no run folder and has none in it")
    return runs


def _states(runs: Sequence[Path]) -> dict[Path, str]:
    """The states of jobs that have not ended, by run; "not known" where SLURM does not answer."""
    states = {}
    for run in runs:
        records = read_submissions(run)
        try:
            states[run] = next(iter(live_states(records[-1]).values()), "") if records else ""
        except UserError:
            states[run] = ""
    return states


def _scores(run: Path, metrics: Sequence[str]) -> dict[str, object]:
    """Iteration and metrics of the last evaluation; those of single classes are left out."""
    records = read_results(str(run))
    if not records:
        return {}
    last = max(record["iteration"] or 0 for record in records)
    records = [record for record in records if (record["iteration"] or 0) == last]
    several = len({record["dataset"] for record in records}) > 1
    scores: dict[str, object] = {}
    for record in records:
        for task, values in record["metrics"].items():
            for name, value in (values if isinstance(values, dict) else {"": values}).items():
                key = "/".join(filter(None, (record["dataset"] if several else "", task, name)))
                wanted = key in metrics if metrics else "-" not in name
                if wanted:
                    scores[key] = "n/a" if value is None else value
    return {"iteration": str(last + 1), **scores}


def results_table(folders: Sequence[Path], metrics: Sequence[str] = ()) -> str:
    """A Markdown table with a row for each run.

    Args:
        folders: of runs, or folders that hold such, as that of a sweep.
        metrics: the columns, as ``bbox/AP``; by default all but those of single classes.

    Raises:
        UserError: for a folder without runs, and results that cannot be read.
    """
    rows: dict[str, dict[str, object]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        runs = _find_runs(folder)
        states = _states(runs)
        for run in runs:
            name = run.name if len(folders) == 1 else str(run)
            loss = last_metrics(run).get("total_loss")
            rows[name] = {
                "state": describe_run(run, states[run]),
                "loss": "" if loss is None else f"{loss:.4g}",
                "iteration": str(iterations_done(run)),
                **_scores(run, metrics),
            }
    return markdown_table("run", rows)


def build_parser() -> argparse.ArgumentParser:
    """The parser of tools/results.py."""
    parser = argparse.ArgumentParser(description="Prints a table of the results of several runs.")
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="of runs or a sweep"
    )
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="a column, as bbox/AP"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of tools/results.py; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        print(results_table(args.folders, args.metric))
    except UserError as error:
        print_error(error)
        return 1
    return 0
