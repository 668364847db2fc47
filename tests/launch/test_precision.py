"""Tests the precision of float32 on a GPU: PyTorch's switches, which exist without a GPU."""

import json

import pytest
import torch
from conftest import QUICK, REPOSITORY

from contnet.launch.arguments import build_run_settings, parse_arguments
from contnet.launch.precision import set_float32_precision
from contnet.launch.run import run

OPTIONS = """
MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32
INPUT.CLASSIFIER.CROP_TEST 32 SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 1 SOLVER.WARMUP_ITERS 0
"""
NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # from PyTorch 2.9 on


def older_switches():
    """Returns the switches of all versions; reading them raises errors if they are inconsistent."""
    return (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
    )


@pytest.fixture(autouse=True)
def restored():
    """Restores PyTorch's switches and cuDNN's benchmark mode."""
    backends = torch.backends
    benchmark, before = backends.cudnn.benchmark, older_switches()[:2]
    if NEWER:
        newer = backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
    yield
    backends.cudnn.benchmark = benchmark
    backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = before
    if NEWER:
        backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision = newer


@pytest.mark.parametrize("earlier", ["", "tf32", "ieee"])
@pytest.mark.parametrize(
    ("value", "switches"),
    [("tf32", (True, True, "high")), ("ieee", (False, False, "highest"))],
)
def test_all_switches_say_the_same(value, switches, earlier):
    set_float32_precision(earlier)
    set_float32_precision(value)
    assert older_switches() == switches
    if NEWER:
        assert torch.backends.cuda.matmul.fp32_precision == value
        assert torch.backends.cudnn.conv.fp32_precision == value


def test_pytorchs_own_stays_by_default_and_on_import():
    import contnet.launch.main
    import contnet.slurm.job  # noqa: F401

    set_float32_precision("")
    assert older_switches() == (False, True, "highest")


def test_a_run_sets_it_and_results_tell(imagenet_here, tmp_path):
    file = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
    options = ["--config-file", file, *QUICK, *OPTIONS.split(), "OUTPUT_DIR", str(tmp_path)]
    settings = build_run_settings(parse_arguments(options))
    assert older_switches() == (False, True, "highest")
    run(settings)
    assert older_switches() == (False, True, "highest")
    assert torch.backends.cudnn.benchmark  # all images have the same size
    options += ["SOLVER.FLOAT32_PRECISION", "ieee"]
    run(build_run_settings(parse_arguments(["--eval-only", "--resume", *options])))
    assert older_switches() == (False, False, "highest")
    assert "float32 tensors in ieee" in (tmp_path / "log.txt").read_text()
    trained, evaluated = json.loads((tmp_path / "results.json").read_text())
    assert (trained["float32_precision"], evaluated["float32_precision"]) == ("", "ieee")
