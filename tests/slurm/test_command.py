"""tools/submit.py and tools/results.py on the private cluster."""

import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY, SMALL
from jobs import PATIENCE, starts_of

from contnet.launch.submissions import last_submission

pytest_plugins = ["jobs"]
pytestmark = pytest.mark.slurm

QUICK = [*SMALL, "SOLVER.BASE_LR", "0.0001", "SOLVER.STEPS", "()", "LOG_PERIOD", "1"]


def tool(name: str, *argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tools" / name), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def submit(folder, *options: str) -> subprocess.Popen:
    config = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
    given = ["--timeout-hours", "1", "--signal-delay", "30", *QUICK, "OUTPUT_DIR", str(folder)]
    return tool("submit.py", "--config-file", config, *given, *options)


def output_of(process: subprocess.Popen) -> str:
    shown, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, shown
    return shown


def test_an_array_followed_and_a_job_cancelled(lab):
    # The folder's name is one that shells and SLURM could stumble over.
    base = lab.folder / "it's an array"
    sweep = ["--sweep", "SEED=1,2", "SOLVER.MAX_ITER", "60", "--watch"]
    watching = submit(base, *sweep)
    other = lab.folder / "other"
    started = submit(other, "--num-nodes", "2", "SOLVER.MAX_ITER", "9999")
    assert re.search(r"submitted job \d+", output_of(started))

    second = f"{base.name}/SEED=2"
    lab.until_iteration(second, 3)
    lab.cluster.ask("scancel", "--signal=USR2", last_submission(base)["runs"]["SEED=2"])

    lab.until_iteration("other", 3)
    assert "cancelled job" in output_of(tool("submit.py", "--cancel", str(other)))
    lab.until_state("other", "stopped")
    lab.until("its end", lambda: not lab.cluster.processes(job=last_submission(other)["job_id"]))
    shown = output_of(tool("submit.py", "--status", str(other)))
    assert "state    cancelled: saved after iteration" in shown

    shown = output_of(watching)
    for name in ("SEED=1", "SEED=2"):
        assert re.search(rf"{name}: running", shown) and re.search(rf"{name}: finished", shown)
    assert starts_of(base / "SEED=1") == [0]
    starts = starts_of(base / "SEED=2")
    assert len(starts) == 2 and starts[1] >= 4
    rows = output_of(tool("results.py", str(base))).splitlines()
    assert [bool(re.search(r"\| finished \|.*\| 60 \|", row)) for row in rows[2:]] == [True, True]
