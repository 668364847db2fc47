"""Writes docs/gpu.md from the results of tools/gpu_check.sh."""

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

Written by `python tools/gpu_check.py --report` from the results of one run on one GPU:

    PYTHON=.venv/bin/python sh tools/gpu_check.sh

In about six minutes it runs the tests that need a GPU, trains and evaluates every system on drawn
shapes, and measures speed and memory; `--help` lists its parts. "Plain" is the reference network of
`benchmarks/plain.py` with the same weights, precision and process, measured in turns with ours.
Times are medians of CUDA events. Peaks are the memory of a call above what was allocated before.
"""
# Title and columns of each table; columns without values are omitted.
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
    "margins": (
        "Attention where maps have margins, in bfloat16",
        (
            *("map", "patch_size", "margin_patches", "pass", "way", "milliseconds", "least"),
            *("most", "speed_ratio", "peak_mb", "peak_ratio"),
        ),
    ),
    "faster_rcnn": (
        "Faster R-CNN, interrupted and resumed",
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
        "Kernels that take most of the time",
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
    """Reads the lines of a results file.

    Raises:
        UserError: if the file is missing, empty or damaged.
    """
    try:
        results = [json.loads(line) for line in file.read_text().splitlines()]
        assert all({"part", "status", "seconds", "figures"} <= set(line) for line in results)
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist: run tools/gpu_check.sh") from error
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{file} cannot be read ({error or 'no results'})") from error
    if not results:
        raise UserError(f"{file} is empty: tools/gpu_check.sh was not run to the end")
    return results


# --- targets -------------------------------------------------------------------------------------


def _verdict(met: bool) -> str:
    return "met" if met else "not met"


def _passes(rows: Iterable[dict], eager: bool) -> list[tuple[str, str, str]]:
    """Returns size, result and verdict of the forward and backward pass, for each size."""
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
            # One configuration must meet both targets.
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
        ("", f"{row['share']:.1%} of what a synchronous save loses", _verdict(row["share"] <= 0.05))
        for row in rows
        if "share" in row
    ]
    return found or [("", "", _NOT_MEASURED)]


def _targets(tables: dict[str, list[dict]]) -> str:
    network = tables.get("network", [])
    targets = {
        "forward and backward in bf16: 2.5 times plain at 0.6 of its peak": _passes(network, False),
        "the same without compilation: 1.7 times plain": _passes(network, True),
        "inference, one image: 3 times plain eager": _inference(tables.get("inference", [])),
        "Faster R-CNN with ConT-M in bf16: no slower than R-50": _detector(tables.get("steps", [])),
        "time lost by a background checkpoint: 5 %": _stall(tables.get("checkpoint", [])),
    }
    lines = ["| target | size | measured | |", "|---|---|---|---|"]
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
    """Describes the device, versions and settings of a run."""
    device = versions.get("gpu") or "a CPU"
    names = ("python", "torch", "cuda", "cudnn", "torchvision", "timm", "detectron2", "numpy")
    known = [f"{name} {versions[name]}" for name in names if versions.get(name)]
    keys = ("tf32_convolutions", "tf32_products")
    tf32 = ["on" if versions.get(key) else "off" for key in keys]
    return (
        f"{device}; {versions.get('date')}; commit {versions.get('commit') or 'not known'}; "
        f"`{versions.get('command')}`. {', '.join(known)}. Unless noted otherwise, TF32 in "
        f"float32 is {tf32[0]} for convolutions and {tf32[1]} for matrix products."
    )


def make_report(results: Sequence[dict]) -> str:
    """Makes the text of the page.

    Args:
        results: lines of results.jsonl; empty if nothing was measured. Only GPU figures are
            shown; from a run on a CPU, the page has only the status of each part.
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
        if versions:
            note = "This run was on a CPU. It shows that the parts run, but has no GPU figures."
            sections += [note, _run(versions)]
        else:
            sections += ["The results do not say which device the parts ran on."]
    else:
        sections += ["Nothing is measured yet, because no GPU was available."]
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
    """Returns the path of the results that a page was made from."""
    return page.with_suffix(".jsonl")


def write_report(output: Path, page: Path) -> None:
    """Writes the page from a folder of results, and copies the results beside it.

    Raises:
        UserError: if the folder has no results, or the page cannot be written.
    """
    results = output / _RESULTS
    text = make_report(read_results(results))
    if not page.parent.is_dir():
        raise UserError(f"the report's folder {page.parent} does not exist")
    with atomic_write(page, "w") as file:
        file.write(text)
    shutil.copyfile(results, kept_results(page))
    print(f"wrote {page}")
