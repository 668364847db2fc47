"""Tests that killed, signalled and damaged training runs end like undisturbed runs.

The moments are fixed here; tests/faults/soak.py draws them at random.
"""

import pytest
from coco import make_coco
from disturbed import Lab
from events import Event, why_no_tmpfs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Lab(folder, make_coco(folder / "datasets"))


@pytest.mark.long
def test_killed_while_it_saves_and_evaluates(lab):
    """After damage, it resumes from the checkpoint before the damaged one."""
    tally = lab.run(
        "killed",
        "one process",
        [
            Event("SIGKILL", "starting", delay=0.2),
            Event("SIGKILL", "saving", delay=0.01),
            Event("SIGKILL", "evaluating", delay=0.05, damage="hole"),
            Event("SIGKILL", "evaluating", everyone=False, clock=86400),
            Event("SIGKILL", "saving", count=2, delay=0.02, damage="cut"),
        ],
    )
    assert tally["SIGKILL, saving"] + tally["SIGKILL, evaluating"] >= 3
    assert tally["set aside"] >= 1


@pytest.mark.long
def test_signalled_once(lab):
    tally = lab.run(
        "signalled",
        "one process",
        [
            Event("SIGTERM", "training", everyone=False),
            Event("SIGINT", "evaluating", delay=0.02),
            Event("SIGHUP", "saving", clock=-86400),
        ],
    )
    assert tally["starts"] == 4


@pytest.mark.long
def test_two_processes(lab):
    tally = lab.run(
        "two",
        "two processes",
        [Event("SIGKILL", "evaluating", everyone=False), Event("SIGTERM", "training", count=2)],
    )
    assert tally["starts"] == 3


@pytest.mark.long
def test_requeued_out_of_an_evaluation(lab):
    tally = lab.run("requeued", "submitted", [Event("SIGUSR2", "evaluating", delay=0.02)])
    assert tally["SIGUSR2, evaluating"] == 1


@pytest.mark.skipif(bool(why_no_tmpfs()), reason=why_no_tmpfs() or "-")
def test_the_disk_fills_up_and_is_freed(lab):
    tally = lab.run("full", "one process", [Event("full disk", "training", count=2)], disk=True)
    assert tally["starts"] == 2
