"""What tools/submit.py does: finds all that is wrong with a run, then gives it to SLURM."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer

from contnet.data.pipeline.loader import images_per_pass
from contnet.engine.writers import COMMIT_VARIABLE, git_commit
from contnet.launch.arguments import add_run_options, check_counts, config_parser, configure
from contnet.launch.distributed import print_error
from contnet.launch.preflight import check_device, check_inputs, check_output
from contnet.modeling.compat import quiet_known_noise
from contnet.slurm.executors import local_executor, sbatch_text, slurm_executor, submit_jobs
from contnet.slurm.job import TrainingJob, python_command
from contnet.slurm.nodes import check_request, check_shared, is_one_machine, read_nodes
from contnet.slurm.records import (
    add_submission,
    cancel,
    check_free,
    describe_run,
    end_local,
    follow,
    live_states,
    print_status,
    process_start,
    slurm_folder,
)
from contnet.slurm.settings import Settings, add_cluster_options, read_settings
from contnet.slurm.snapshot import list_code, take_snapshot
from contnet.slurm.sweep import RunArguments, expand_runs
from contnet.utils.errors import UserError

__all__ = ["build_parser", "main", "parse_submission"]

_EPILOG = """\
examples:
  submit            submit.py --config-file configs/faster_rcnn_contm.yaml --num-gpus 8
                    --num-nodes 4 --partition gpu --timeout-hours 24 MODEL.WEIGHTS contm.pth
                    SOLVER.REFERENCE_WORLD_SIZE 8
  only show it      the same with --dry-run
  an array          submit.py --config-file ... --sweep SOLVER.BASE_LR=0.01,0.02 --sweep SEED=1,2
  how it does       submit.py --status output/faster_rcnn_contm
  end it            submit.py --cancel output/faster_rcnn_contm
docs/slurm.md tells more.
"""


# --- command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """train_net.py's parser, with options for clusters, arrays and jobs."""
    parser = config_parser("Submits what train_net.py would run.", _EPILOG, required=False)
    add_run_options(parser)
    group = parser.add_argument_group("submission")
    group.add_argument(
        "--cluster",
        choices=("auto", "slurm", "local"),
        default="auto",
        help="where it runs; auto: SLURM where there is sbatch, otherwise this machine (default)",
    )
    group.add_argument("--dry-run", action="store_true", help="show it, submit and write nothing")
    group.add_argument("--watch", action="store_true", help="then follow the log, till the end")
    group.add_argument(
        "--no-snapshot", action="store_true", help="run the code as it is when the job starts"
    )
    group.add_argument(
        "--array", default="", metavar="FILE", help="one run for each line of arguments in it"
    )
    group.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="one run for each value; repeated, for each combination; KEY may be config-file",
    )
    group.add_argument(
        "--max-parallel", type=int, default=0, metavar="N", help="runs of an array at a time"
    )
    about = group.add_mutually_exclusive_group()
    about.add_argument("--status", metavar="FOLDER", help="tell how the job of a run folder does")
    about.add_argument("--cancel", metavar="FOLDER", help="end the job of a run folder")
    add_cluster_options(parser)
    return parser


def parse_submission(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line of tools/submit.py (this process's own by default).

    Raises:
        UserError: for arguments that do not fit together.
    """
    args = build_parser().parse_intermixed_args(argv)
    check_counts(args)
    reason = "in a job each process finds its rank and the first machine by itself, leave it out"
    if args.machine_rank != 0:
        raise UserError(f"--machine-rank is for train_net.py on machines without SLURM: {reason}")
    if args.dist_url != "auto":
        raise UserError(f"--dist-url is for train_net.py on machines without SLURM: {reason}")
    if args.max_parallel < 0:
        raise UserError("--max-parallel must be at least 1")
    if args.max_parallel and not (args.array or args.sweep):
        raise UserError("--max-parallel is for --array and --sweep")
    return args


# --- the runs ------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run of a submission: what was asked for, its whole config, and its folder."""

    arguments: RunArguments
    cfg: CfgNode
    folder: Path


def _base_folder(args: argparse.Namespace, runs: Sequence[RunArguments], cfg: CfgNode) -> Path:
    """OUTPUT_DIR of a run alone; of an array, the folder that its runs' folders lie in."""
    if (len(runs) == 1 and not runs[0].name) or "OUTPUT_DIR" in args.opts[::2]:
        return Path(cfg.OUTPUT_DIR).expanduser().absolute()
    if args.array:
        return Path("output", Path(args.array).stem).absolute()
    return Path(f"{cfg.OUTPUT_DIR}_sweep").expanduser().absolute()


@contextlib.contextmanager
def _own_datasets():
    """Forgets the data sets that are registered within, whose names other runs may use anew."""
    before = set(DatasetCatalog.list())
    try:
        yield
    finally:
        for name in set(DatasetCatalog.list()) - before:
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name)


def _check_content(cfg: CfgNode, arguments: RunArguments, processes: int, seen: set) -> None:
    """The checks of train_net.py; of what runs have in common, the data sets, once."""
    relevant = cfg.clone()
    relevant.OUTPUT_DIR = relevant.MODEL.WEIGHTS = ""
    for key in ("BASE_LR", "MAX_ITER", "STEPS", "WEIGHT_DECAY", "WARMUP_ITERS"):
        relevant.SOLVER.pop(key)
    relevant.SEED = 0
    key = (relevant.dump(), arguments.eval_only)
    check_inputs(cfg, argparse.Namespace(**asdict(arguments)), processes, data=key not in seen)
    seen.add(key)


def _prepare_runs(args: argparse.Namespace) -> tuple[Path, list[Run]]:
    """Reads and checks every run; nothing is written."""
    expanded = expand_runs(args)
    processes = args.num_gpus * args.num_machines
    base, runs, seen = None, [], set()
    for number, arguments in enumerate(expanded, 1):
        try:
            with _own_datasets():
                copy = argparse.Namespace(**asdict(arguments), notes=())
                cfg = DefaultTrainer.auto_scale_workers(configure(copy), processes)
                base = base or _base_folder(args, expanded, cfg)
                cfg.OUTPUT_DIR = str(base / arguments.name)
                weights = cfg.MODEL.WEIGHTS
                if weights and "://" not in weights:
                    cfg.MODEL.WEIGHTS = os.path.abspath(os.path.expanduser(weights))
                for note in copy.notes:
                    print(note)
                _check_content(cfg, arguments, processes, seen)
                check_free(cfg.OUTPUT_DIR)
                check_output(cfg, argparse.Namespace(**asdict(arguments)), make=False)
        except UserError as error:
            if not arguments.name:
                raise
            which = f"run {number} of {len(expanded)} ({arguments.name})"
            raise UserError(f"{which}: {error}") from error
        runs.append(Run(arguments, cfg, Path(cfg.OUTPUT_DIR)))
    return base, runs


# --- where it runs -------------------------------------------------------------------------------


def _choose_cluster(args: argparse.Namespace) -> str:
    present = shutil.which("sbatch") is not None
    if args.cluster == "slurm" and not present and not args.dry_run:
        raise UserError("there is no sbatch on PATH: add --cluster local to run on this machine")
    if args.cluster == "auto":
        print(
            "sbatch is here: this goes to SLURM (--cluster local runs it on this machine)"
            if present
            else "there is no sbatch here: running on this machine (--cluster local)"
        )
        return "slurm" if present else "local"
    return args.cluster


def _check_slurm(args: argparse.Namespace, settings: Settings, runs: Sequence[Run], base: Path):
    """What must be right for SLURM: the request, and folders that all nodes see."""
    gpus = 0 if runs[0].cfg.MODEL.DEVICE == "cpu" else args.num_gpus
    if shutil.which("sinfo") is None and args.dry_run:
        print("SLURM is not on this machine: partitions and nodes are not checked")
        if not settings.timeout_hours:
            raise UserError("how long may the job run? Add --timeout-hours")
        nodes = []
    else:
        nodes = check_request(read_nodes(), settings, args.num_machines, gpus, args.num_gpus)
    if "%" in str(base):
        raise UserError(f"the run folder {base} has a % in it, which SLURM replaces: rename it")
    if settings.assume_shared or (nodes and is_one_machine(nodes)):
        return
    check_shared(base, "the run folder")
    for weights in {run.cfg.MODEL.WEIGHTS for run in runs} - {""}:
        if "://" not in weights:
            check_shared(weights, "MODEL.WEIGHTS")
    if not settings.python:
        check_shared(sys.prefix, "this Python, in")


def _check_local(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    if args.num_machines > 1:
        raise UserError(
            f"--num-nodes is {args.num_machines}, but without SLURM there is this machine alone: "
            "use --num-nodes 1, or train_net.py on each machine (docs/training.md)"
        )
    for run in runs:
        check_device(run.cfg, args.num_gpus * max(1, min(args.max_parallel, len(runs))))


def _check_devices(runs: Sequence[Run]) -> None:
    for run in runs:
        if run.cfg.MODEL.DEVICE != "cpu" and not run.cfg.MODEL.DEVICE.startswith("cuda"):
            raise UserError(f"MODEL.DEVICE is {run.cfg.MODEL.DEVICE!r}, it must be cuda or cpu")
    if len({torch.device(run.cfg.MODEL.DEVICE).type for run in runs}) > 1:
        raise UserError("the runs of an array must all have the same MODEL.DEVICE")


# --- the submission ------------------------------------------------------------------------------


@dataclass
class Submission:
    """All that is decided before anything is written."""

    args: argparse.Namespace
    settings: Settings
    cluster: str
    base: Path
    runs: list[Run]
    folder: Path  # of this submission, below base/slurm
    command: list[str]

    @property
    def is_array(self) -> bool:
        return bool(self.runs[0].arguments.name)

    @property
    def gpus(self) -> int:
        """GPUs on each node."""
        return 0 if self.runs[0].cfg.MODEL.DEVICE == "cpu" else self.args.num_gpus

    @property
    def parallel(self) -> int:
        """Runs at a time."""
        wanted = self.args.max_parallel or (1 if self.cluster == "local" else len(self.runs))
        return min(wanted, len(self.runs))

    @property
    def code(self) -> str:
        """What goes on PYTHONPATH."""
        root, _, _, path = list_code()
        return str((root if self.args.no_snapshot else self.folder / "code") / path)

    def config_file(self, run: Run) -> Path:
        """Where the whole config of a run is kept."""
        return self.folder / f"{run.arguments.name or 'config'}.yaml"

    def job(self, run: Run) -> TrainingJob:
        """What is called in every task."""
        flags = {"--resume": run.arguments.resume, "--eval-only": run.arguments.eval_only}
        return TrainingJob(
            argv=[
                *("--config-file", str(self.config_file(run))),
                *("--num-gpus", str(self.args.num_gpus)),
                *(flag for flag, given in flags.items() if given),
                *("OUTPUT_DIR", str(run.folder)),
            ],
            run_folder=str(run.folder),
            max_requeues=self.settings.max_requeues,
            hang_timeout=self.settings.hang_timeout,
            interface=self.settings.interface,
            setup={"signal_delay": self.settings.signal_delay},
        )

    def environment(self) -> dict[str, str]:
        """What the job must find. Paths keep the meaning that they have here."""
        datasets = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
        paths = [self.code, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        return {
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in paths if path),
            # Otherwise a package in the folder where the job starts would go before the snapshot.
            "PYTHONSAFEPATH": "1",
            "DETECTRON2_DATASETS": os.path.abspath(datasets),
            COMMIT_VARIABLE: git_commit(),
        }

    def python(self) -> str:
        """The command that starts Python."""
        words = shlex.split(python_command())
        return shlex.join([self.settings.python or words[0], *words[1:]])

    def slurm_executor(self):
        """submitit's, with everything set."""
        return slurm_executor(
            self.folder,
            self.settings,
            name=self.base.name if self.is_array else Path(self.runs[0].arguments.config_file).stem,
            nodes=self.args.num_machines,
            tasks=self.args.num_gpus,
            gpus=self.gpus,
            environment=self.environment(),
            python=self.python(),
            parallel=self.parallel,
        )

    def local_executor(self, slot: int = 0):
        """The one for this machine; ``slot`` counts the runs that go on at a time."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
            str(index) for index in range(torch.cuda.device_count() if self.gpus else 0)
        )
        first = slot * self.gpus
        return local_executor(
            self.folder,
            self.settings,
            tasks=self.args.num_gpus,
            gpus=visible.split(",")[first : first + self.gpus] if self.gpus else [],
            environment=self.environment(),
            python=self.python(),
        )

    def log(self, job_id: str) -> Path:
        """Of the first task of a job."""
        return self.folder / f"{job_id}_0_log.out"

    def record(self, job_id: str, run_folder: Path, runs: dict[str, str] | None = None) -> dict:
        """What submission.json says of it."""
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "cluster": self.cluster,
            "host": socket.gethostname(),
            "job_id": job_id,
            "runs": runs or {},
            "run_folder": str(run_folder),
            "job_folder": str(self.folder),
            "log": str(self.log(job_id)),
            "command": self.command,
            "folder": str(Path.cwd()),
            "git_commit": git_commit(),
            "code": self.code,
            "nodes": self.args.num_machines,
            "tasks": self.args.num_gpus,
            "settings": asdict(self.settings),
            "process_start": process_start(int(job_id)) if self.cluster == "local" else "",
        }


def _next_folder(base: Path) -> Path:
    folder = slurm_folder(base)
    numbers = [int(p.name.removeprefix("submission")) for p in folder.glob("submission[0-9]*")]
    return folder / f"submission{max(numbers, default=0) + 1}"


def _describe(plan: Submission) -> None:
    args, cfg, runs = plan.args, plan.runs[0].cfg, plan.runs
    where = "SLURM" if plan.cluster == "slurm" else "this machine"
    device = "GPU" if plan.gpus else "process"
    nodes, tasks = args.num_machines, args.num_gpus
    print(f"{where}: {nodes} node(s) x {tasks} {device}(s)")
    if not runs[0].arguments.eval_only:
        images = images_per_pass(cfg, nodes * tasks)
        solver, first = cfg.SOLVER, "first run: " if plan.is_array else ""
        print(
            f"{first}batch {solver.IMS_PER_BATCH} = {nodes} nodes x {tasks} processes x {images} "
            f"images x {solver.ACCUMULATE} passes; learning rate {solver.BASE_LR:g}, "
            f"{solver.MAX_ITER} iterations"
        )
    if plan.is_array:
        print(f"{len(runs)} runs in {plan.base}, {plan.parallel} at a time:")
        for run in runs:
            print(f"  {run.arguments.name}")
    else:
        print(f"run folder {plan.base}")
    workers = cfg.DATALOADER.NUM_WORKERS
    if plan.cluster == "slurm" and workers and not plan.settings.cpus_per_gpu:
        print(
            "no --cpus-per-gpu: each process and its loader workers (DATALOADER.NUM_WORKERS "
            f"{workers}) share what the cluster gives, often one core"
        )
    _describe_code(plan)


def _describe_code(plan: Submission) -> None:
    if plan.args.no_snapshot:
        print(f"code {plan.code}, as it will be when the job starts (--no-snapshot)")
        return
    root, files, large, _ = list_code()
    print(f"code: a copy of {len(files)} files of {root}, commit {git_commit() or 'unknown'}")
    if large:
        print(f"  left out, for they are larger than 20 MiB: {', '.join(large[:5])}")


def _dry_run(plan: Submission) -> None:
    print("dry run: nothing is submitted or written")
    print(f"would make {plan.folder} with the code, each run's whole config, pickles and logs")
    if plan.cluster == "slurm":
        print(f"would give this to sbatch:\n\n{sbatch_text(plan.slurm_executor(), len(plan.runs))}")
    else:
        lines = [f"export {name}={shlex.quote(v)}" for name, v in plan.environment().items()]
        print("\n".join(["would run here, with", *lines, *plan.settings.setup]))
        print(f"{plan.args.num_gpus} x {plan.python()} -u -m submitit.core._submit {plan.folder}")
    for run in plan.runs:
        print(f"{run.arguments.name or 'training'}: {shlex.join(plan.job(run).argv)}")
    settings = plan.settings
    network = f", on network {settings.interface}" if settings.interface else ""
    print(
        f"requeued at most {settings.max_requeues} times, given up after "
        f"{settings.hang_timeout:g} s without progress{network}"
    )


def _write_files(plan: Submission) -> None:
    try:
        plan.folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(
            f"another submission into {plan.base} is going on: wait for it, then try again"
        ) from error
    except OSError as error:
        raise UserError(f"{plan.folder} cannot be made ({error.strerror})") from error
    if not plan.args.no_snapshot:
        take_snapshot(plan.folder / "code")
    for run in plan.runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        plan.config_file(run).write_text(run.cfg.dump())


def _record(plan: Submission, job_ids: Sequence[str]) -> None:
    for run, job_id in zip(plan.runs, job_ids, strict=True):
        add_submission(run.folder, plan.record(job_id, run.folder))
    if plan.is_array:
        names = [run.arguments.name for run in plan.runs]
        first = job_ids[0].partition("_")[0]
        runs = dict(zip(names, job_ids, strict=True))
        add_submission(plan.base, plan.record(first, plan.base, runs))


def _run_queue(plan: Submission) -> bool:
    """Runs an array on this machine, some runs at a time; stays until all have ended."""
    waiting, slots, jobs = list(plan.runs), {}, {}
    names = {run.arguments.name: "" for run in plan.runs}
    add_submission(plan.base, plan.record(str(os.getpid()), plan.base, names))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # by --cancel
    try:
        while waiting or slots:
            for slot in sorted(set(range(plan.parallel)) - set(slots))[: len(waiting)]:
                run = waiting.pop(0)
                (job_id,) = submit_jobs(plan.local_executor(slot), [plan.job(run)])
                jobs[slot] = (run, plan.record(job_id, run.folder))
                add_submission(run.folder, jobs[slot][1])
                slots[slot] = run
                print(f"{run.arguments.name}: started, process {job_id}", flush=True)
            time.sleep(1)
            for slot, run in list(slots.items()):
                if not live_states(jobs[slot][1]):
                    del slots[slot]
                    print(f"{run.arguments.name}: {describe_run(run.folder)}", flush=True)
    except KeyboardInterrupt:
        end_local([jobs[slot][1] for slot in slots])
        raise UserError("interrupted: the runs that were going on are cancelled") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    return all(describe_run(run.folder) == "finished" for run in plan.runs)


def _send(plan: Submission) -> bool:
    """Writes and submits; returns whether all is well."""
    _write_files(plan)
    if plan.cluster == "local" and plan.is_array:
        return _run_queue(plan)
    try:
        executor = plan.slurm_executor() if plan.cluster == "slurm" else plan.local_executor()
        job_ids = submit_jobs(executor, [plan.job(run) for run in plan.runs])
    except UserError:
        shutil.rmtree(plan.folder)
        raise
    _record(plan, job_ids)
    kind = "job" if plan.cluster == "slurm" else "process"
    number = job_ids[0].partition("_")[0]
    print(f"submitted {kind} {number}; logs in {plan.folder}")
    print(f"how it does: python tools/submit.py --status {shlex.quote(str(plan.base))}")
    return not plan.args.watch or follow(plan.base)


def _submit(args: argparse.Namespace, command: list[str]) -> bool:
    settings = read_settings(args)
    cluster = _choose_cluster(args)
    base, runs = _prepare_runs(args)
    _check_devices(runs)
    if settings.signal_delay >= 3600 * settings.timeout_hours > 0:
        raise UserError(
            f"--signal-delay {settings.signal_delay} s leaves nothing of --timeout-hours "
            f"{settings.timeout_hours:g}"
        )
    if cluster == "slurm":
        _check_slurm(args, settings, runs, base)
    else:
        _check_local(args, runs)
    check_free(base)
    plan = Submission(args, settings, cluster, base, runs, _next_folder(base), command)
    _describe(plan)
    if args.dry_run:
        _dry_run(plan)
        return True
    return _send(plan)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of tools/submit.py.

    Args:
        argv: the command line, this process's own by default.

    Returns:
        The exit status: 0 if the run was submitted (and, where it was followed, has finished).
        Mistakes of the user's are one line on the error stream and status 1.
    """
    quiet_known_noise()
    try:
        args = parse_submission(argv)
        if args.cancel:
            cancel(args.cancel)
        elif args.status and args.watch:
            return 0 if follow(args.status) else 1
        elif args.status:
            print_status(args.status)
        else:
            command = [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
            return 0 if _submit(args, command) else 1
    except UserError as error:
        print_error(error)
        return 1
    return 0
