"""Tests the GPU check on a CPU: its files, its failures, and its report."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

from benchmarks.gpu.machine import GPU_TESTS
from benchmarks.gpu.margins import WAYS, make_patches
from benchmarks.gpu.part import Part, measure
from benchmarks.gpu.report import PAGE, kept_results, make_report, read_results
from benchmarks.gpu_check import PARTS, main
from contnet.utils.errors import UserError

TESTS = REPOSITORY / "tests"


def check(*options, python=sys.executable, device="cpu", timeout=100):
    command = ["sh", str(REPOSITORY / "tools" / "gpu_check.sh"), "--device", device, *options]
    environment = {**os.environ, "PYTHON": str(python)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def as_line(part, table, **figures):
    return {"part": part, "status": "ok", "seconds": 1, "figures": {"table": table, **figures}}


# --- the script ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_and_its_report(tmp_path):
    options = ("--budget", "800", "--output", str(tmp_path / "out"))
    done = check(*options, timeout=850)
    assert done.returncode == 0, done.stdout + (tmp_path / "out" / "log.txt").read_text()[-3000:]
    lines = lines_of(tmp_path / "out")
    assert {(line["part"], line["status"]) for line in lines} == {(part, "ok") for part in PARTS}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"results.jsonl", "log.txt", "tests.xml"}
    figures = [line["figures"] for line in lines]
    # The figures say what a CPU cannot do.
    assert all(len(each["left_out"]) > 10 for each in figures if "left_out" in each)
    missing = {each["table"] for each in figures if "left_out" in each}
    assert missing == {"attention", "margins", "network", "regions", "inference"}
    assert all("failed" not in each for each in figures)
    losses = [loss for each in figures for loss in each.get("losses", ())]
    assert len(losses) > 10 and all(torch.tensor(losses).isfinite())
    # On a CPU, a resumed run is bit for bit the same as an uninterrupted one.
    resumed = [each for each in figures if each.get("run") == "resumed"]
    assert {each["precision"] for each in resumed} == {"fp32", "bf16", "fp16"}
    assert all(each["largest_difference"] == 0 for each in resumed)

    page = tmp_path / "gpu.md"
    assert main(["--report", str(page), "--output", str(tmp_path / "out")]) == 0
    text = page.read_text()
    assert "This run was on a CPU" in text and "sh tools/gpu_check.sh --device cpu" in text
    assert text.count("| not measured |") == 5 and "met |" not in text
    assert "milliseconds" not in text
    assert kept_results(page).read_text() == (tmp_path / "out" / "results.jsonl").read_text()

    # The same figures from a GPU fill one table for each kind.
    for each in figures:
        if each["table"] == "versions":
            each.update(device="cuda", gpu="a card that there is not")
    text = make_report(lines)
    assert "a card that there is not" in text
    titles = {line for line in text.splitlines() if line.startswith("## ")}
    # "versions" is a paragraph; targets and parts have their own tables.
    assert len(titles) == len({each["table"] for each in figures}) - 1 + 2


def test_a_part_leaves_its_lines_and_a_log(tmp_path):
    done = check("--only", "versions", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout
    lines = lines_of(tmp_path)
    assert {(line["part"], line["status"]) for line in lines} == {("versions", "ok")}
    versions, ceilings = (line["figures"] for line in lines)
    assert versions["torch"] == torch.__version__
    assert versions["command"].endswith(f"--device cpu --only versions --output {tmp_path}")
    assert ceilings["copy_gb_per_second"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "results.jsonl"]


def test_parts_after_one_that_failed_have_their_turn(tmp_path):
    options = ("--only", "network", "--only", "versions", "--output", str(tmp_path))
    assert check(*options, python="false").returncode == 1
    assert [(line["part"], line["status"], line["figures"]) for line in lines_of(tmp_path)] == [
        ("versions", "failed", {}),
        ("network", "failed", {}),
    ]


def test_what_was_recorded_before_a_part_died_stays(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'echo \'{{"table": "network", "way": "a/b & c"}}\' >"{tmp_path}/$3.figures"\n'
        "echo dead; kill -9 $$\n"
    )
    python.chmod(0o755)
    done = check("--only", "network", "--output", str(tmp_path), python=python)
    assert done.returncode == 1 and done.stdout.splitlines()[-1].strip() == "dead"
    (line,) = lines_of(tmp_path)
    assert (line["status"], line["figures"]["way"]) == ("failed", "a/b & c")


def test_parts_without_time_are_left_out(tmp_path):
    options = ("--budget", "5", "--only", "versions", "--output", str(tmp_path))
    done = check(*options)
    assert (done.returncode, done.stdout) == (1, "versions: left out, 0 s\n")
    assert [line["status"] for line in lines_of(tmp_path)] == ["left out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "versoins"], "error: no part versoins"),
        (["--part", "versions"], "error: unknown option --part"),
        (["--only"], "error: --only needs a value"),
        (["--budget", "6m"], "error: --budget is a number of seconds"),
    ],
)
def test_mistakes_are_one_line(options, message, tmp_path):
    done = check("--output", str(tmp_path / "out"), *options)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(message)
    assert not (tmp_path / "out").exists()


def test_help_lists_the_parts():
    done = check("--help")
    _, _, listed = done.stdout.partition("Parts, in this order:\n")
    listed = [line.split()[0] for line in listed.splitlines()]
    assert listed == list(PARTS) and len(listed) <= 12


def test_every_file_with_a_test_for_a_gpu_is_run():
    marked = {
        str(path.relative_to(TESTS))
        for path in TESTS.rglob("test_*.py")
        if "mark.gpu" in path.read_text() and path.name != "test_gpu_check.py"
    }
    assert marked == set(GPU_TESTS)


# --- a part --------------------------------------------------------------------------------------


def test_a_failure_stops_nothing(tmp_path):
    def fail():
        raise RuntimeError("out of\nmemory")

    def refuse():
        raise RuntimeError("No available kernel. Aborting execution.")

    part = Part("network", "cpu", tmp_path)
    measure(part, "network", {"bad": fail, "no": refuse, "good": list}, size="1x1")
    rows = [json.loads(line) for line in (tmp_path / "network.figures").read_text().splitlines()]
    assert [(row["way"], row["size"]) for row in rows] == [
        ("bad", "1x1"),
        ("no", "1x1"),
        ("good", "1x1"),
    ]
    assert rows[0]["failed"] == "RuntimeError: out of memory"
    assert "refused" in rows[1] and rows[2]["milliseconds"] >= 0
    with pytest.raises(UserError, match="1 of the part's measurements failed"):
        part.finish()


@pytest.mark.parametrize("patch_size", [7, 14])
def test_the_ways_to_handle_margins_agree(patch_size):
    """The ways agree on all tokens except the padding, and so do their gradients."""
    patches = make_patches("cpu", 2, 20, 33, 1, patch_size)
    assert 0 < len(patches.margins) < len(patches.valid)
    assert patches.offsets[-1] == len(patches.tokens) == patches.valid.sum()
    weights = torch.linspace(-1, 1, 64) * patches.valid[..., None]
    taken = {}
    for name in ("mask all patches", "mask margin patches"):
        out = WAYS[name](patches)
        (gradient,) = torch.autograd.grad((out * weights).sum(), patches.qkv)
        taken[name] = out[patches.valid], gradient
    for all_patches, only_margins in zip(*taken.values(), strict=True):
        torch.testing.assert_close(only_margins, all_patches, rtol=0, atol=0.02)


# --- the report ----------------------------------------------------------------------------------


def test_the_page_is_up_to_date():
    """If this fails, run: python tools/gpu_check.py --report."""
    page = REPOSITORY / PAGE
    kept = kept_results(page)
    assert page.read_text() == make_report(read_results(kept) if kept.exists() else [])


def test_a_folder_without_results_is_one_line(tmp_path, capsys):
    page = tmp_path / "gpu.md"
    assert main(["--report", str(page), "--output", str(tmp_path / "gone")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "does not exist: run tools/gpu_check.sh" in line
    (tmp_path / "results.jsonl").write_text('{"part": "versions"}\n')
    assert main(["--report", str(page), "--output", str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not page.exists()


CARD = as_line("versions", "versions", device="cuda", gpu="NVIDIA Test", torch="2.11.0")


def targets(*lines):
    """Returns the last two cells of each target's first line."""
    text = make_report([CARD, *lines])
    table = text[text.index("## Targets") : text.index("## Parts")].splitlines()
    rows = [line for line in table if line.startswith("| ")][1:]
    return [[cell.strip() for cell in row.split("|")[3:5]] for row in rows]


def step(way, ratio, peak, **more):
    row = {"size": "224x224, batch 128", "pass": "forward and backward", "way": way}
    return as_line("network", "network", **row, speed_ratio=ratio, peak_ratio=peak, **more)


def test_speed_and_peak_must_come_together():
    fast, small = step("ours bf16", 2.6, 0.9), step("ours bf16, block computed again", 1.6, 0.2)
    both, eager, *_ = targets(fast, small)
    assert both == ["1.60 (ours bf16, block computed again, 0.20 of its peak)", "not met"]
    assert eager == ["2.60 (ours bf16)", "met"]
    compiled = step("ours bf16, encoders compiled, budget 0.8", 2.5, 0.5)
    both, eager, *_ = targets(fast, small, compiled)
    assert both[1] == "met" and "compiled" in both[0]
    assert "compiled" not in eager[0]


def test_the_other_targets():
    lines = [
        as_line("inference", "inference", size="1", way="optimized bf16", speed_ratio=2.9),
        as_line("steps", "steps", size="1", precision="bf16", way="contm", speed_ratio=1.25),
        as_line("steps", "steps", size="1", precision="fp32", way="contm", speed_ratio=0.5),
        as_line("checkpoint", "checkpoint", share=0.04),
    ]
    assert targets(*lines) == [
        ["", "not measured"],
        ["", "not measured"],
        ["2.90 (optimized bf16)", "not met"],
        ["0.80 of R-50's time", "met"],
        ["4.0% of what a synchronous save loses", "met"],
    ]


def test_rows_that_failed_say_why():
    failed = as_line("attention", "attention", kernel="flash", mask="margins", refused="a | mask")
    assert "| flash | margins | refused: a \\| mask |" in make_report([CARD, failed])
    assert targets(failed)[0] == ["", "not measured"]
