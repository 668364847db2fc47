"""docs/gpu.md, made from the results of tools/gpu_check.sh; without any it says `not measured`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from contnet.utils.errors import UserError
from contnet.utils.files import atomic_write

__all__ = ["PAGE", "kept_results", "make_report", "read_results", "write_report"]

PAGE = "docs/gpu.md"
_RESULTS = "results.jsonl"
_NOT_MEASURED = "not measured"
_HEAD = """# On a GPU

Written by `python tools/gpu_check.py --report` from the figures of one call on one card:

    PYTHON=.venv/bin/python sh tools/gpu_check.sh

It runs the tests that need a GPU, trains and evaluates every system on drawn shapes, and measures,
in about six minutes; `--help` lists its parts. "Plain" is the reference network of
`benchmarks/plain.py` with the same weights, in the same precision and process, in turns with ours.
Times are medians by CUDA events; peaks are what a call takes above what was there before.
"""
# Title of each table, and its columns; one that no row has is left out.
_TABLES = {
    "ceilings": ("Ceilings", ("tflops_bf16", "copy_gb_per_second")),
    "tests": ("Tests", ("tests", "failures", "errors", "skipped", "failed_tests")),
    "attention": (
        "Attention, in bfloat16, against a softmax in float32",
        (
            *("kernel", "patches", "tokens", "heads", "mask", "difference", "gradient_difference"),
            *("forward_ms", "forward_and_backward_ms"),
        ),
    ),
    "faster_rcnn": (
        "Faster R-CNN, cut in the middle and resumed",
        (
            *("precision", "run", "iterations", "first_loss", "last_loss", "first_difference"),
            *("largest_difference", "seconds_per_iteration", "peak_mb"),
        ),
    ),
    "network": (
        "The network",
        (
            *("size", "pass", "way", "milliseconds", "least", "most", "speed_ratio", "peak_mb"),
            "peak_ratio",
        ),
    ),
    "systems": (
        "Other systems",
        (
            *("system", "precision", "first_loss", "last_loss", "seconds_per_iteration"),
            *("peak_mb", "backend"),
        ),
    ),
    "steps": (
        "Training steps of Faster R-CNN",
        (
            *("size", "precision", "way", "milliseconds", "least", "most", "speed_ratio"),
            *("peak_mb", "peak_ratio"),
        ),
    ),
    "regions": (
        "Pooled regions, before and after exact coordinates",
        ("precision", "way", "difference", "milliseconds", "peak_mb"),
    ),
    "inference": (
        "Inference, one image",
        ("size", "way", "milliseconds", "least", "most", "speed_ratio", "peak_mb"),
    ),
    "profiled steps": (
        "Profiled steps",
        ("step", "milliseconds", "kernel_ms", "busy", "launches"),
    ),
    "kernels": (
        "Kernels that most of the time goes to",
        ("step", "rank", "kernel", "calls", "milliseconds", "share"),
    ),
    "ddp": (
        "Distributed, on one process",
        ("backend", "way", "milliseconds", "speed_ratio", "peak_mb"),
    ),
    "ddp warnings": ("Warnings of DistributedDataParallel", ("strides", "warnings")),
    "checkpoint": (
        "Checkpoints",
        (
            *("megabytes", "steps", "step_ms", "synchronous_save_ms", "synchronous_lost_ms"),
            *("background_save_ms", "background_lost_ms", "share"),
        ),
    ),
}
_ENDS = ("failed", "refused", "left_out")


def read_results(file: Path) -> list[dict]:
    """The lines of a results file.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    try:
        results = [json.loads(line) for line in file.read_text().splitlines()]
        assert all({"part", "status", "seconds", "figures"} <= set(line) for line in results)
    except FileNotFoundError as error:
        raise UserError(f"there is no {file}: tools/gpu_check.sh writes it") from error
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{file} cannot be read ({error or 'no results'})") from error
    if not results:
        raise UserError(f"{file} is empty: tools/gpu_check.sh was not run to its end")
    return results


# --- targets -------------------------------------------------------------------------------------


def _verdict(met: bool) -> str:
    return "met" if met else "not met"


def _passes(rows: Iterable[dict], eager: bool) -> list[tuple[str, str, str]]:
    """By size: the figure of the forward and backward pass, and whether it is what was asked."""
    rows = [
        row
        for row in rows
        if row.get("pass") == "forward and backward"
        and row.get("way", "").startswith("ours bf16")
        and "speed_ratio" in row
        and not (eager and "compiled" in row["way"])
    ]
    found = []
    for size in dict.fromkeys(row["size"] for row in rows):
        own = [row for row in rows if row["size"] == size]
        if not eager:
            # One configuration must have both.
            small = [row for row in own if row.get("peak_ratio", 1) <= 0.6]
            own = small or own
        best = max(own, key=lambda row: row["speed_ratio"])
        text = f"{best['speed_ratio']:.2f} ({best['way']}"
        met = best["speed_ratio"] >= (1.7 if eager else 2.5)
        if not eager:
            peak = best.get("peak_ratio")
            text += f", {'peak not known' if peak is None else f'{peak:.2f} of its peak'}"
            met = met and peak is not None and peak <= 0.6
        found.append((size, f"{text})", _verdict(met)))
    return found or [("", "", _NOT_MEASURED)]


def _inference(rows: Iterable[dict]) -> list[tuple[str, str, str]]:
    found = [
        (
            row["size"],
            f"{row['speed_ratio']:.2f} ({row['way']})",
            _verdict(row["speed_ratio"] >= 3),
        )
        for row in rows
        if row.get("way") == "optimized bf16" and "speed_ratio" in row
    ]
    return found or [("", "", _NOT_MEASURED)]


def _detector(rows: Iterable[dict]) -> list[tuple[str, str, str]]:
    found = []
    for row in rows:
        if (row.get("precision"), row.get("way")) == ("bf16", "contm") and "speed_ratio" in row:
            share = 1 / row["speed_ratio"]
            found.append((row["size"], f"{share:.2f} of R-50's time", _verdict(share <= 1)))
    return found or [("", "", _NOT_MEASURED)]


def _stall(rows: Iterable[dict]) -> list[tuple[str, str, str]]:
    found = [
        ("", f"{row['share']:.1%} of what a waited for save loses", _verdict(row["share"] <= 0.05))
        for row in rows
        if "share" in row
    ]
    return found or [("", "", _NOT_MEASURED)]


def _targets(tables: dict[str, list[dict]]) -> str:
    network = tables.get("network", [])
    targets = {
        "forward and backward in bf16: 2.5 times plain at 0.6 of its peak": _passes(network, False),
        "the same, eager alone: 1.7 times plain": _passes(network, True),
        "inference, one image: 3 times plain eager": _inference(tables.get("inference", [])),
        "Faster R-CNN with ConT-M in bf16: no slower than R-50": _detector(tables.get("steps", [])),
        "checkpoint's stall: 5 %": _stall(tables.get("checkpoint", [])),
    }
    lines = ["| asked for | size | measured | |", "|---|---|---|---|"]
    for target, found in targets.items():
        lines += [_line([target, *each]) for each in found]
    return "\n".join(lines)


# --- tables --------------------------------------------------------------------------------------


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "none"
    return " ".join(str(value).split()).replace("|", "\\|")


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _table(rows: Sequence[dict], columns: Sequence[str]) -> str:
    columns = [each for each in columns if any(row.get(each) is not None for row in rows)]
    ended = any(set(_ENDS) & set(row) for row in rows)
    heads = [*(each.replace("_", " ") for each in columns), *([""] if ended else [])]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row.get(each) for each in columns]
        ends = [f"{each.replace('_', ' ')}: {row[each]}" for each in _ENDS if each in row]
        lines.append(_line([*cells, *([" ".join(ends)] if ended else [])]))
    return "\n".join(lines)


def _run(versions: dict) -> str:
    """What the figures hold for."""
    device = versions.get("gpu") or "a CPU"
    names = ("python", "torch", "cuda", "cudnn", "torchvision", "timm", "detectron2", "numpy")
    known = [f"{name} {versions[name]}" for name in names if versions.get(name)]
    keys = ("tf32_convolutions", "tf32_products")
    tf32 = ["on" if versions.get(key) else "off" for key in keys]
    return (
        f"{device}; {versions.get('date')}; commit {versions.get('commit') or 'not known'}; "
        f"`{versions.get('command')}`. {', '.join(known)}. Where nothing else is said, TF32 in "
        f"float32 is {tf32[0]} for convolutions and {tf32[1]} for products."
    )


def make_report(results: Sequence[dict]) -> str:
    """The text of the page.

    Args:
        results: the lines of results.jsonl; none if nothing was measured. Only figures of a GPU are
            told as measured: of a CPU's the page has no more than how the parts ended.
    """
    parts: dict[str, dict] = {}
    tables: dict[str, list[dict]] = {}
    for line in results:
        parts[line["part"]] = line
        if line["figures"]:
            tables.setdefault(line["figures"]["table"], []).append(line["figures"])
    versions = tables.get("versions", [{}])[-1]
    measured = versions.get("device") == "cuda"
    sections = [_HEAD]
    if measured:
        sections += [_run(versions)]
    elif results:
        of = "on a CPU, which shows that the parts run, and no figures of a GPU"
        if versions:
            sections += [f"No GPU yet: this was a try {of}.", _run(versions)]
        else:
            sections += ["No GPU is known to have been there: nothing says what the parts ran on."]
    else:
        sections += ["No GPU was there yet: nothing is measured."]
    sections += ["## Targets", _targets(tables if measured else {})]
    if parts:
        rows = [
            {key: line[key] for key in ("part", "status", "seconds")} for line in parts.values()
        ]
        sections += ["## Parts", _table(rows, ("part", "status", "seconds"))]
    if measured:
        for name, (title, columns) in _TABLES.items():
            if name in tables:
                sections += [f"## {title}", _table(tables[name], columns)]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def kept_results(page: Path) -> Path:
    """Where the results are that a page was made from."""
    return page.with_suffix(".jsonl")


def write_report(output: Path, page: Path) -> None:
    """Writes the page from a folder of results, which it keeps beside it.

    Raises:
        UserError: if the folder has no results, or the page cannot be written.
    """
    results = output / _RESULTS
    text = make_report(read_results(results))
    if not page.parent.is_dir():
        raise UserError(f"there is no folder {page.parent} for the report")
    with atomic_write(page, "w") as file:
        file.write(text)
    shutil.copyfile(results, kept_results(page))
    print(f"wrote {page}")
