"""Tests jobs that fail, or whose machines fail."""

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from cluster import NODES
from jobs import PATIENCE, arguments, run_here, same_training, starts_of
from submitit.core.utils import FailedJobError

from contnet.launch.rendezvous import ports
from contnet.slurm.status import read_status

pytest_plugins = ["jobs"]
pytestmark = pytest.mark.slurm

SAVES = ("SOLVER.CHECKPOINT_PERIOD", "10")


def test_rank_killed_in_training(lab, reference, coco_root):
    job = lab.submit(lab.job("killed", *SAVES, faults={"kill": (1, 15)}), nodes=2, tasks=1)
    status = lab.until_state("killed", "failed")
    assert lab.until_over(job) == "FAILED"
    assert "rank 1" in status["failure"]["reason"], status["failure"]
    run = run_here(lab.folder / "killed", coco_root, *SAVES, "--resume", processes=2)
    assert starts_of(run) == [0, 10]
    same_training(run, reference(2))


def test_rank_killed_in_a_save(lab, reference):
    job = lab.submit(lab.job("half", *SAVES, faults={"pace": 0.1, "save": 3.0}), nodes=1, tasks=2)
    saving = lab.folder / "half" / "saving"
    lab.until("the first save", saving.exists)
    saving.unlink()
    lab.until("the second save", saving.exists)
    run = lab.folder / "half"
    assert len(list(run.glob("model_0000019.pth.*.tmp"))) == 1
    os.kill(lab.cluster.tasks(job.job_id)[0], signal.SIGKILL)
    assert lab.until_over(job) == "FAILED"
    assert (run / "last_checkpoint").read_text() == "model_0000009.pth"
    again = lab.submit(lab.job("half", *SAVES, "--resume"), nodes=1, tasks=2)
    assert lab.until_over(again) == "COMPLETED"
    assert starts_of(run) == [0, 10] and not list(run.glob("*.tmp"))
    same_training(run, reference(2))


def test_crash_on_one_rank(lab):
    job = lab.submit(lab.job("crash", faults={"crash": (1, 5)}), nodes=2, tasks=1)
    reasons = {
        "nan": "the loss is not finite at iteration 5",
        "memory": "the GPU is out of memory at iteration 5",
    }
    others = {
        name: lab.submit(lab.job(name, faults={name: (1, 5)}), nodes=1, tasks=2) for name in reasons
    }
    for name, reason in reasons.items():
        status = lab.until_state(name, "failed")
        assert lab.until_over(others[name]) == "FAILED"
        assert status["failure"]["rank"] == 1 and reason in status["failure"]["reason"]
        assert status["restart"] == 0 and not status["requeues"]
    status = lab.until_state("crash", "failed")
    assert lab.until_over(job) == "FAILED"
    failure = status["failure"]
    assert (failure["rank"], failure["iteration"]) == (1, 4)
    assert failure["reason"] == "ValueError: a fault of this rank's own"
    assert "_misbehave" in failure["details"]
    assert status["restart"] == 0 and not status["requeues"]
    assert "a fault of this rank's own" in str(job.task(1).exception())


def test_hung_rank_is_reported_with_stacks(lab):
    job = lab.job("hung", faults={"sleep": (1, 5)}, hang_timeout=8.0)
    job = lab.submit(job, nodes=1, tasks=2)
    status = lab.until_state("hung", "failed")
    assert lab.until_over(job) == "FAILED"
    assert "no progress for" in status["failure"]["reason"] and status["failure"]["iteration"] == 4
    stacks = [Path(status["folder"], f"rank-0000{rank}.stack").read_text() for rank in (0, 1)]
    assert "backward" in stacks[0] and "_misbehave" in stacks[1]


def test_no_time_to_save(lab, reference):
    """A rank hangs in a collective, the other in its step: neither can save and leave."""
    job = lab.job(
        "stuck",
        *SAVES,
        faults={"sleep": (1, 15)},
        heartbeat_interval=0.5,
        signal_delay=8,
    )
    job = lab.submit(job, nodes=1, tasks=2)
    lab.until_iteration("stuck", 14)
    lab.cluster.ask("scancel", "--signal=USR2", job.job_id)
    status = lab.until_state("stuck", "finished")
    assert lab.until_over(job) == "COMPLETED"
    (record,) = status["requeues"]
    assert record["reason"] == "6 s were not enough to save and exit" and record["iteration"] == 9
    assert starts_of(lab.folder / "stuck") == [0, 10]
    same_training(lab.folder / "stuck", reference(2))


def test_node_fails(lab, reference):
    # The job stays between two saves until SLURM has noticed.
    job = lab.submit(lab.job("node", *SAVES, faults={"sleep": (1, 15)}), nodes=2, tasks=1)
    lab.until_iteration("node", 14)
    lab.cluster.fail_node(NODES[1])
    lab.until("the requeue", lambda: lab.slurm_state(job) == "PENDING", 120)
    lab.cluster.start_node(NODES[1])
    lab.until_state("node", "finished")
    assert lab.until_over(job) == "COMPLETED"
    assert starts_of(lab.folder / "node") == [0, 10]
    same_training(lab.folder / "node", reference(2))


def test_survivors_of_a_lost_node_do_not_write(lab, reference):
    saves = ("SOLVER.CHECKPOINT_PERIOD", "2")
    job = lab.job("survivor", *saves, faults={"slow": 4.0})
    job = lab.submit(job, nodes=1, tasks=1, nodelist=NODES[0])
    lab.until_iteration("survivor", 2)
    old = lab.cluster.tasks(job.job_id)[0]
    lab.cluster.kill_daemon(NODES[0])
    lab.until("the requeue", lambda: lab.slurm_state(job) == "PENDING", 120)
    # The stopped process would write when it continues, after the other start has ended.
    os.kill(old, signal.SIGSTOP)
    lab.cluster.ask("scontrol", "update", f"JobId={job.job_id}", f"ReqNodeList={NODES[1]}")
    lab.until_state("survivor", "finished")
    # A node that returned earlier would stay allocated, with the job's lost step on it.
    assert lab.until_ended(job) == "COMPLETED"
    run = lab.folder / "survivor"

    def written():
        files = (p for p in run.iterdir() if p.is_file() and "log" not in p.name)
        return {p: p.stat().st_mtime_ns for p in files}

    before = written()
    os.kill(old, signal.SIGCONT)
    lab.until("the survivor's end", lambda: not Path(f"/proc/{old}").exists(), 30)
    assert written() == before
    (start,) = starts_of(run)[1:]
    assert start >= 2
    lab.cluster.start_node(NODES[0])
    assert lab.until_over(job) == "COMPLETED"
    same_training(run, reference(1))


def test_array_of_jobs_on_the_same_nodes(lab, reference):
    sweep = [lab.job(name, faults={"pace": 0.2}) for name in ("array0", "array1")]
    first, second = lab.submit(*sweep, nodes=2, tasks=1)
    # The first port of each job is in use.

    def numbers():
        found = set(lab.cluster.ask("squeue", "-h", "-r", "-trunning", "-o%A").split())
        return len(found) == 2 and found

    ids = lab.until("both to start", numbers)
    taken = [socket.create_server(("", ports(f"{number}.0.0")[0])) for number in ids]
    lab.until_iteration("array1", 5)
    lab.cluster.ask("scancel", "--signal=TERM", second.job_id)  # while it is RUNNING
    for job in (first, second):
        assert lab.until_over(job) == "COMPLETED"
    for server in taken:
        server.close()
    assert starts_of(lab.folder / "array0") == [0]
    assert len(starts_of(lab.folder / "array1")) == 2
    for name in ("array0", "array1"):
        same_training(lab.folder / name, reference(2))


def test_srun_without_submitit(lab, reference):
    run = lab.folder / "plain"
    code = "import sys, toy; from contnet.launch.main import main; sys.exit(main(sys.argv[1:]))"
    command = (sys.executable, "-c", code, *arguments(run))
    lab.cluster.ask("srun", "-N2", "--ntasks-per-node=1", *command, patience=PATIENCE)
    same_training(run, reference(2))


def test_asking_for_too_much(lab):
    with pytest.raises(FailedJobError, match="Batch job submission failed"):
        lab.submit(lab.job("much"), nodes=3, tasks=1)
    with pytest.raises(FailedJobError, match="Batch job submission failed"):
        lab.submit(lab.job("much"), nodes=1, tasks=1, gpus_per_node=3)
    assert not read_status(lab.folder / "much")
