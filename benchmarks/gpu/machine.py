"""Records versions and the GPU's peak speeds, and runs the tests that need a GPU."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu.part import Part
from benchmarks.limits import measure_ceilings
from contnet.engine.run_record import git_commit
from contnet.utils.errors import UserError

__all__ = ["GPU_TESTS", "check_versions", "run_tests"]

_TESTS = Path(__file__).resolve().parents[2] / "tests"
# Files with tests that are marked gpu; collecting all files would take a minute.
GPU_TESTS = ("test_gpu.py", "checkpoint/test_background_writer.py", "launch/test_errors.py")
_PACKAGES = ("torchvision", "timm", "sal-detectron2", "numpy")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_versions(part: Part) -> None:
    """Records the versions and settings, and the speeds of a copy and of a matrix product."""
    if part.on_gpu and not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU here: run the script with --device cpu")
    part.record(
        "versions",
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=os.environ.get("GPU_CHECK_COMMAND", " ".join(sys.argv)),
        commit=git_commit(),
        device=part.device,
        gpu=torch.cuda.get_device_name() if part.on_gpu else None,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if part.on_gpu else None,
        # Whether "fp32" means TF32 unless noted otherwise.
        tf32_convolutions=torch.backends.cudnn.allow_tf32,
        tf32_products=torch.backends.cuda.matmul.allow_tf32,
        python=platform.python_version(),
        torch=torch.__version__,
        **{name.removeprefix("sal-"): _version(name) for name in _PACKAGES},
    )
    with part.fence("ceilings"):
        size = {} if part.on_gpu else {"side": 256, "copied": 2**20}
        macs, copied = measure_ceilings(part.device, torch.bfloat16, **size)
        part.record("ceilings", tflops_bf16=2 * macs / 1e12, copy_gb_per_second=copied / 1e9)


def run_tests(part: Part) -> None:
    """Runs the tests that are marked gpu; without a GPU they are skipped."""
    report = part.output / "tests.xml"
    report.unlink(missing_ok=True)
    files = [str(_TESTS / name) for name in GPU_TESTS]
    options = ["-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    status = subprocess.run([sys.executable, "-m", "pytest", *files, *options]).returncode
    if not report.exists():
        raise UserError(f"pytest did not run (exit status {status})")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    wrong = [case for case in suite.iter("testcase") if case.find("failure") is not None]
    part.record("tests", **counts, failed_tests=[case.get("name") for case in wrong])
    if status or (part.on_gpu and counts["skipped"]):
        raise UserError("some tests failed or were skipped, see the log of this part")
