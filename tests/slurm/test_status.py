"""Tests --status, --cancel and the table of results for submissions."""

import json
import shutil

import pytest
from damages import DAMAGES, damage
from submissions import GPU, error_of, submit

from contnet.commands.results import collect_results, results_table
from contnet.launch.run_lease import RunLease
from contnet.slurm.attempt_folder import AttemptFolder, record_requeue
from contnet.slurm.submit import main

pytest_plugins = ["submissions"]


def test_status_and_cancel(slurm, here, capsys):
    assert submit(*GPU, "OUTPUT_DIR", "out") == 0
    slurm.show_jobs("4242|PENDING|Priority\n")
    capsys.readouterr()
    assert main(["--status", "out"]) == 0
    shown = capsys.readouterr().out
    assert "job      4242 on slurm" in shown
    assert "pending (priority)" in shown
    assert main(["--cancel", "out"]) == 0
    assert "cancelled job 4242" in capsys.readouterr().out
    assert "scancel 4242" in slurm.calls
    slurm.show_jobs("")
    assert "nothing to cancel" in error_of(capsys, "--cancel", "out")
    assert "nothing was submitted" in error_of(capsys, "--status", ".")
    assert main(["--status", "out"]) == 0
    assert "state    cancelled" in capsys.readouterr().out
    assert "not allowed with" in error_of(capsys, "--status", "out", "--cancel", "out")


def test_status_and_cancel_of_an_array(slurm, here, capsys):
    assert submit("--sweep", "SEED=1,2,3", *GPU, "OUTPUT_DIR", "out") == 0
    slurm.show_jobs("4242_1|RUNNING|None\n4242_2|PENDING|JobArrayTaskLimit\n42421|RUNNING|None\n")
    capsys.readouterr()
    assert main(["--status", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("SEED=2")] == ["running"]
    assert any(line.startswith("SEED=1") and "never started" in line for line in lines)
    assert main(["--cancel", "out/SEED=2"]) == 0
    assert "scancel 4242_1" in slurm.calls
    assert main(["--cancel", "out"]) == 0
    assert "scancel 4242" in slurm.calls
    assert "42421" not in capsys.readouterr().out


def test_results_table(slurm, here, capsys):
    assert submit("--sweep", "SEED=1,2,3", *GPU, "OUTPUT_DIR", "out") == 0
    done, failed = here / "out" / "SEED=1", here / "out" / "SEED=2"
    scores = {"bbox": {"AP": 12.3456, "AP50": 30.0, "AP-person": 5.0}}
    result = {"dataset": "coco_2017_val", "weights": None, "ema": False, "metrics": scores}
    (done / "results.json").write_text(json.dumps([{**result, "iteration": 9}]))
    (done / "metrics.json").write_text('{"iteration": 9, "total_loss": 1.5}\n')
    (done / "model_final.pth").write_text("")
    (failed / "metrics.json").write_text('{"iteration": 3, "total_loss": 2.5}\n{"iter')
    table = results_table(collect_results([here / "out"])).splitlines()
    cells = {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]] for row in table}
    assert cells["run"] == ["state", "loss", "iteration", "bbox/AP", "bbox/AP50"]
    assert cells["SEED=1"] == ["finished", "1.5", "10", "12.35", "30.00"]
    assert cells["SEED=2"] == ["not finished", "2.5", "4", "", ""]
    assert cells["SEED=3"] == ["never started", "", "0", "", ""]
    rows = collect_results([here / "out"], ["bbox/AP-person"])
    assert [row["metrics"] for row in rows] == [{"bbox/AP-person": 5.0}, {}, {}]


@pytest.fixture
def left(slurm, here):
    """Makes the folder of a run whose job has failed."""
    assert submit(*GPU, "OUTPUT_DIR", "out") == 0
    out = here / "out"
    folder = AttemptFolder(out, "4242", 0)
    folder.path.mkdir(parents=True)
    lease = RunLease(out, "slurm", "4242")
    lease.take()
    lease.release()
    beat = {"rank": 0, "host": "h", "pid": 7, "iteration": 4, "max_iter": 9, "phase": "training"}
    folder.write_heartbeat({**beat, "heartbeat_interval": 5, "ended": None})
    folder.note("failure", {"rank": 0, "reason": "it broke", "details": "", "lost": True})
    folder.note("exit", {"rank": 0, "reason": "it broke", "requeued": False, "status": 1})
    requeue = {"job_id": "4242", "restart": 0, "iteration": 3, "reason": "time"}
    record_requeue(out, requeue)
    (out / "metrics.json").write_text('{"iteration": 4, "total_loss": 1.5}\n')
    return out


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
def test_status_of_damaged_files(left, slurm, capsys, caplog, content):
    slurm.show_jobs("")
    for file in sorted(left.rglob("*.json")):
        whole = file.read_bytes()
        damage(file, content)
        before = sorted(left.rglob("*"))
        caplog.clear()
        capsys.readouterr()
        status = main(["--status", str(left)])
        output, errors = capsys.readouterr()
        assert status == (file.name == "submission.json"), file
        said = [errors] * status + [record.getMessage() for record in caplog.records]
        empty = file.name == "metrics.json" and content == b""
        assert len(said) == (not empty) and all(str(file) in line for line in said), file
        assert output.startswith("run ") or status
        assert main(["--cancel", str(left)]) == 1  # because the job has ended
        assert sorted(left.rglob("*")) == before
        shutil.rmtree(file) if content is None else file.unlink()
        file.write_bytes(whole)


def test_a_damaged_submission_is_set_aside_by_the_next(left, slurm, caplog):
    (left / "slurm" / "submission.json").write_text("[")
    slurm.show_jobs("")
    assert submit(*GPU, "OUTPUT_DIR", "out") == 0
    assert (left / "slurm" / "set_aside" / "submission.json").read_text() == "["
    assert main(["--status", "out"]) == 0
