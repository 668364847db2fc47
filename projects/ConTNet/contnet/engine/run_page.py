"""The report page that a training updates: curves and tables from the run's own files."""

from __future__ import annotations

from pathlib import Path

from contnet.analysis.runs import RunRecord, curve_sections, result_sections
from contnet.engine.writers import read_metrics
from contnet.evaluation.results import read_results
from contnet.report.page import Notes, write_page
from contnet.utils.errors import UserError
from contnet.utils.files import NO_GUARD, WriteGuard
from contnet.utils.records import read_bytes

__all__ = ["PAGE", "read_run_record", "write_run_page"]

PAGE = "report.html"
_CONFIG_FILE = "config.yaml"


def read_run_record(folder: Path, name: str) -> RunRecord:
    """Reads a run's record from its folder; missing or damaged files count as empty.

    Args:
        folder: folder of the run.
        name: name of the run.
    """
    try:
        config = (read_bytes(folder / _CONFIG_FILE) or b"").decode()
    except (UserError, UnicodeDecodeError):
        config = ""
    return RunRecord(name, read_metrics(folder), read_results(str(folder)), config)


def write_run_page(folder: Path, guard: WriteGuard = NO_GUARD) -> Path:
    """Writes the page of a run, with its curves and results; returns its path.

    Args:
        folder: folder of the run.
        guard: as in :func:`contnet.utils.files.atomic_write`.
    """
    run = read_run_record(folder, folder.resolve().name)
    rest = (
        "For errors by kind, confusion and images, run python tools/report.py with the run's "
        "folder."
    )
    sections = [*result_sections([run]), *curve_sections([run]), Notes("More", [rest])]
    return write_page(folder / PAGE, run.name, sections, guard)
