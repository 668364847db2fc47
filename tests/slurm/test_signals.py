"""Tests jobs that must stop: by signals, the time limit, other jobs, or the user."""

import os
import signal
import subprocess

import pytest
from jobs import ITERATIONS, run_here, same_training, starts_of

from contnet.slurm.status import read_status

pytest_plugins = ["jobs"]
pytestmark = pytest.mark.slurm


def _children(pid):
    answer = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(word) for word in answer.stdout.split()]


def _saved_before(status, start):
    """Returns the last iteration before ``start``; checks that no iteration was lost."""
    record = status["requeues"][start - 1]
    assert record["reason"].startswith(f"saved after iteration {record['iteration']}")
    return record["iteration"]


def test_time_limit_and_the_bound_of_requeues(lab, reference):
    # Three jobs with one task each, which run side by side.
    limited = lab.submit(lab.job("limit", faults={"pace": 4.0}), nodes=1, tasks=1, minutes=2)
    bounded = lab.job("bound", max_requeues=1, faults={"pace": 0.5})
    bounded = lab.submit(bounded, nodes=1, tasks=1)
    evaluated = lab.submit(lab.job("evaluation", faults={"evaluation": 2.0}), nodes=1, tasks=1)

    lab.until_iteration("bound", 3)
    lab.cluster.ask("scancel", "--signal=USR2", bounded.job_id)

    def evaluates():
        ranks = read_status(lab.folder / "evaluation").get("ranks", {})
        return ranks and ranks[0]["phase"] == "evaluation"

    lab.until("the evaluation", evaluates)
    lab.cluster.ask("scancel", "--signal=USR2", evaluated.job_id)
    lab.until_state("evaluation", "requeued", patience=10)

    lab.until_iteration("bound", 8, restart=1)
    lab.cluster.ask("scancel", "--signal=USR2", bounded.job_id)
    status = lab.until_state("bound", "stopped")
    assert "the last one allowed" in status["exit"]["reason"]
    assert lab.until_over(bounded) == "FAILED"
    assert "the last one allowed" in str(bounded.exception())

    assert lab.until_over(evaluated) == "COMPLETED"
    assert starts_of(lab.folder / "evaluation") == [0, ITERATIONS]
    same_training(lab.folder / "evaluation", reference(1))

    status = lab.until_state("limit", "finished")
    assert lab.until_over(limited) == "COMPLETED"
    starts = starts_of(lab.folder / "limit")
    assert starts[:2] == [0, _saved_before(status, 1) + 1]
    same_training(lab.folder / "limit", reference(1))


def test_usr2_then_requeued_by_hand(lab, reference):
    job = lab.submit(lab.job("hand", faults={"pace": 0.3, "slow": 1.0}), nodes=2, tasks=1)
    lab.until_iteration("hand", 2)
    # Loader workers get the signals that SLURM sends to their task, which must not end anything.
    for pid in lab.cluster.tasks(job.job_id).values():
        for worker in _children(pid):
            os.kill(worker, signal.SIGUSR2)
            os.kill(worker, signal.SIGTERM)
    lab.until_iteration("hand", 5)
    for _ in range(2):
        lab.cluster.ask("scancel", "--signal=USR2", job.job_id)
    status = lab.until_iteration("hand", 10, restart=1)
    saved = _saved_before(status, 1)
    assert 5 <= saved < 10
    lab.cluster.ask("scontrol", "requeue", job.job_id)
    status = lab.until_state("hand", "finished")
    assert lab.until_over(job) == "COMPLETED"
    assert status["restart"] == 2 and len(status["requeues"]) == 1
    first, second, third = starts_of(lab.folder / "hand")
    assert first == 0 and second == saved + 1
    assert third >= 11  # SIGTERM leaves time to save
    same_training(lab.folder / "hand", reference(2))
    assert job.results()[0]["bbox"]["AP"] >= 0


def test_preempted_by_a_partition(lab, reference):
    job = lab.submit(lab.job("urgent", faults={"pace": 0.2}), nodes=2, tasks=2)
    lab.until_iteration("urgent", 5)
    lab.cluster.ask("sbatch", "-purgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap=true")
    status = lab.until_state("urgent", "finished")
    assert lab.until_over(job) == "COMPLETED"
    assert starts_of(lab.folder / "urgent") == [0, _saved_before(status, 1) + 1]
    same_training(lab.folder / "urgent", reference(4))


def test_cancelled_jobs_do_not_come_back(lab, reference, coco_root):
    job = lab.submit(lab.job("cancelled", faults={"pace": 0.3}), nodes=1, tasks=2)
    status = lab.until_iteration("cancelled", 5)
    lab.cluster.ask("scancel", job.job_id)
    assert lab.until_over(job) == "CANCELLED"
    status = lab.until_state("cancelled", "stopped")
    assert not status["requeues"] and not status["exit"]["requeued"]
    assert status["exit"]["iteration"] == status["iteration"] >= 5
    # A later run resumes from the checkpoint that was saved in those seconds.
    run = run_here(lab.folder / "cancelled", coco_root, "--resume", processes=2)
    assert starts_of(run) == [0, status["iteration"] + 1]
    same_training(run, reference(2))
    assert lab.slurm_state(job) == "CANCELLED"  # no requeue has started in all this time
