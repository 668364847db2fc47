"""Jobs on the private cluster: submitted like the tool does, followed, and compared."""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import submitit
import torch
from cluster import Cluster, free_ports, running_cluster, why_no_slurm
from conftest import REPOSITORY, SMALL, metrics_of
from equality import equal
from finished import write_config
from toy import FAULTS, ToyJob

from contnet.launch.main import main
from contnet.slurm.job import python_command
from contnet.slurm.status import read_status

__all__ = [
    "ITERATIONS",
    "PATIENCE",
    "Lab",
    "arguments",
    "run_here",
    "running_lab",
    "same_training",
    "starts_of",
]

ITERATIONS = 30
# Maximum seconds of a job in these tests, even on a busy machine.
PATIENCE = 240


def arguments(folder: Path, *options: str) -> list[str]:
    """Returns the command line of a small training of the toy."""
    config = REPOSITORY / "configs" / "faster_rcnn_contti.yaml"
    toy = "MODEL.META_ARCHITECTURE Toy MODEL.BACKBONE.NAME ToyBackbone SOLVER.IMS_PER_BATCH 4"
    run = f"LOG_PERIOD 1 DATALOADER.NUM_WORKERS 1 SOLVER.MAX_ITER {ITERATIONS}"
    given = ["--config-file", str(config), *SMALL, *toy.split(), *run.split()]
    return [*given, "OUTPUT_DIR", str(folder), *options]


class Lab:
    """Runs toy jobs on a cluster.

    Args:
        cluster: a running cluster.
        folder: folder for the runs.
    """

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster = cluster
        self.folder = folder

    def job(self, name: str, *options: str, **settings) -> ToyJob:
        """Makes a job of the run ``name``; the other settings are those of :class:`ToyJob`."""
        argv = arguments(self.folder / name, *options)
        values = {
            **write_config(argv, self.folder / "configs" / f"{name}.yaml"),
            "heartbeat_interval": 0.5,
            "signal_delay": 30,
            "hang_timeout": 120.0,
            **settings,
        }
        return ToyJob(**values)

    def submit(self, *jobs: ToyJob, nodes: int, tasks: int, minutes: int = 10, **parameters):
        """Submits a job, or an array of jobs; returns submitit's jobs."""
        executor = submitit.SlurmExecutor(self.folder / "submitit", python=python_command())
        executor.update_parameters(
            nodes=nodes,
            ntasks_per_node=tasks,
            time=minutes,
            signal_delay_s=30,
            stderr_to_stdout=True,
            srun_args=["--kill-on-bad-exit=1"],
            additional_parameters={"requeue": True, **parameters},
        )
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
        return submitted if len(jobs) > 1 else submitted[0]

    def until(self, what: str, done, patience: float = PATIENCE):
        """Waits for a condition; returns its value."""
        end = time.monotonic() + patience
        while not (answer := done()):
            assert time.monotonic() < end, f"waited {patience} s for: {what}\n{self.report()}"
            time.sleep(0.25)
        return answer

    def until_state(self, name: str, *states: str, patience: float = PATIENCE) -> dict:
        """Waits until a run's status is one of ``states``; returns the status."""

        def done():
            status = read_status(self.folder / name)
            return status if status.get("state") in states else None

        return self.until(f"{name} to be {' or '.join(states)}", done, patience)

    def until_iteration(self, name: str, iteration: int, restart: int = 0) -> dict:
        """Waits until a start of a run has finished an iteration; returns the status."""

        def done():
            status = read_status(self.folder / name)
            ready = status and status["restart"] == restart and status["iteration"] >= iteration
            assert not status or not status["failure"], status["failure"]
            return status if ready else None

        return self.until(f"{name} to do iteration {iteration} of start {restart}", done)

    def slurm_state(self, job) -> str:
        return self.cluster.ask("squeue", "-h", "-tall", f"-j{job.job_id}", "-o%T")

    def until_ended(self, job) -> str:
        """Waits until a job has ended for SLURM; returns its state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.until(
            f"the end of {job.job_id}", lambda: (s := self.slurm_state(job)) in ended and s
        )

    def until_over(self, job) -> str:
        """Waits until a job has ended and none of its processes is left; returns its state."""
        state = self.until_ended(job)
        # Each task of an array has its own number.
        raw = self.cluster.ask("squeue", "-h", "-r", "-tall", f"-j{job.job_id}", "-o%A")
        self.until("its processes to end", lambda: not self.cluster.processes(job=raw), 30)
        return state

    def report(self) -> str:
        """Returns information for a failed test: all jobs' states, and more about the newest."""
        lines = [self.cluster.ask("squeue", "-tall", check=False)]
        for file in sorted((self.cluster.root / "log").glob("slurm*.log")):
            lines += [f"--- {file.name}", *file.read_text(errors="replace").splitlines()[-20:]]
        outputs = (self.folder / "submitit").glob("*.out")
        for file in sorted(outputs, key=lambda file: file.stat().st_mtime)[-2:]:
            lines += [f"--- {file.name}", file.read_text(errors="replace")[-3000:]]
        runs = [run for run in self.folder.iterdir() if read_status(run)]
        for run in sorted(runs, key=lambda run: run.stat().st_mtime)[-2:]:
            lines += [f"--- {run.name}", json.dumps(read_status(run))]
        return "\n".join(lines)


def run_here(folder: Path, coco_root: Path, *options: str, processes: int) -> Path:
    """Trains without SLURM in forked processes, which need no imports."""
    # The folder in which the imported Detectron2 looks for data.
    where = folder.parent / "here"
    where.mkdir(exist_ok=True)
    if not (where / "datasets").exists():
        (where / "datasets").symlink_to(coco_root)
    (port,) = free_ports(1)
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            _run_rank(rank, processes, port, where, arguments(folder, *options))
        children.append(child)
    try:
        for _ in range(processes):
            status = os.waitstatus_to_exitcode(os.wait()[1])
            log = (where / "log.txt").read_text()
            assert status == 0, f"{folder} ended with {status}: {log[-3000:]}"
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    return folder


def _run_rank(rank: int, processes: int, port: int, where: Path, argv: list[str]) -> None:
    """Runs a rank in a forked process, which never returns."""
    status = 1
    try:
        log = os.open(where / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w")
        FAULTS.clear()
        os.chdir(where)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(processes),
            LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        status = main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def same_training(run: Path, reference: Path) -> None:
    """Checks that two runs ended with bit for bit equal weights, optimizer and metrics."""
    ours, theirs = (torch.load(folder / "model_final.pth") for folder in (run, reference))
    assert equal(ours["model"], theirs["model"]), "the weights differ"
    assert equal(ours["trainer"]["optimizer"], theirs["trainer"]["optimizer"])
    assert [line["iteration"] for line in metrics_of(run)] == list(range(ITERATIONS))
    # As text, because nan does not equal itself.
    assert list(map(repr, metrics_of(run))) == list(map(repr, metrics_of(reference)))


def starts_of(run: Path) -> list[int]:
    """Returns the first iteration of each start."""
    return [start["start_iter"] for start in json.loads((run / "run.json").read_text())]


@contextlib.contextmanager
def running_lab(coco_root: Path, folder: Path) -> Iterator[Lab]:
    """Provides a cluster and a folder for its runs; everything is removed at the end."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="slurm") as root:
        package = REPOSITORY / "projects" / "ConTNet"
        patch.setenv("PYTHONPATH", f"{package}:{Path(__file__).parent}")
        patch.setenv("DETECTRON2_DATASETS", str(coco_root))
        patch.setenv("OMP_NUM_THREADS", "1")
        with running_cluster(Path(root)) as cluster:
            patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
            patch.setenv("PATH", cluster.environment["PATH"])
            yield Lab(cluster, folder)
        assert not cluster.processes()


@pytest.fixture(scope="session")
def lab(coco_root, tmp_path_factory):
    """Provides a :class:`Lab` for all tests."""
    if reason := why_no_slurm():
        pytest.skip(reason)
    with running_lab(coco_root, tmp_path_factory.mktemp("runs")) as lab:
        yield lab


@pytest.fixture(scope="session")
def reference(coco_root, tmp_path_factory):
    """Makes uninterrupted runs, by number of processes."""
    made = {}

    def get(processes: int) -> Path:
        if processes not in made:
            folder = tmp_path_factory.mktemp("reference") / "run"
            made[processes] = run_here(folder, coco_root, processes=processes)
        return made[processes]

    return get
