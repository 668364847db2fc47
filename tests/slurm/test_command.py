"""Tests tools/submit.py and tools/results.py on the private cluster."""

import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY, SMALL
from jobs import PATIENCE, starts_of

from contnet.commands.results import collect_results, results_table
from contnet.slurm.records import last_submission
from contnet.slurm.submit import main

pytest_plugins = ["jobs"]
pytestmark = pytest.mark.slurm

CONFIG = REPOSITORY / "configs" / "faster_rcnn_contti.yaml"
OPTIONS = """
--num-nodes 2 --timeout-hours 1 --signal-delay 30 --sweep SEED=1,2 --watch SOLVER.MAX_ITER 60
SOLVER.BASE_LR 0.0001 SOLVER.STEPS () LOG_PERIOD 1 OUTPUT_DIR
"""


def test_an_array_of_which_one_run_is_cancelled(lab, capsys):
    # A name with special characters for shells and SLURM.
    base = lab.folder / "it's an array"
    command = [sys.executable, str(REPOSITORY / "tools" / "submit.py"), "--config-file"]
    command += [str(CONFIG), *SMALL, *OPTIONS.split(), str(base)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipe) as watching:
        lab.until_iteration(f"{base.name}/SEED=1", 3)
        lab.cluster.ask("scancel", "--signal=USR2", last_submission(base)["runs"]["SEED=1"])
        lab.until_iteration(f"{base.name}/SEED=2", 3)
        assert main(["--cancel", str(base / "SEED=2")]) == 0
        shown, _ = watching.communicate(timeout=PATIENCE)
    assert watching.returncode == 1, shown  # one run has not finished
    assert "SEED=1: running" in shown and "SEED=1: finished" in shown
    assert "SEED=2: cancelled" in shown

    starts = starts_of(base / "SEED=1")
    assert len(starts) == 2 and starts[1] >= 4
    capsys.readouterr()
    assert main(["--status", str(base)]) == 0
    assert re.search("SEED=2 .*cancelled", capsys.readouterr().out)
    rows = results_table(collect_results([base])).splitlines()[2:]
    assert "| finished |" in rows[0] and "| 60 |" in rows[0]
    assert "| cancelled" in rows[1]
