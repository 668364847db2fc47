"""The command tools/submit.py: checks a run, then submits it to SLURM."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from contnet.config.paths import expand_path
from contnet.launch.arguments import add_run_options, check_run_options, config_parser
from contnet.launch.gpus import check_device_value, check_gpu_count
from contnet.modeling.compat import silence_known_warnings
from contnet.slurm.describe import follow, print_status
from contnet.slurm.jobs import cancel, check_free
from contnet.slurm.local_queue import run_queue
from contnet.slurm.nodes import check_request, check_shared, is_one_machine, read_nodes
from contnet.slurm.preview import describe, show_dry_run
from contnet.slurm.runs import Run, prepare_runs
from contnet.slurm.settings import (
    ClusterSettings,
    add_cluster_options,
    check_text,
    read_settings,
)
from contnet.slurm.submission import Submission, next_folder, send, write_files
from contnet.utils.addresses import redact
from contnet.utils.command import run_command
from contnet.utils.errors import UsageError, UserError
from contnet.utils.files import explaining_disk

__all__ = ["build_parser", "main", "parse_submission"]

_EPILOG = """\
examples:
  submit            submit.py --config-file configs/faster_rcnn_contm.yaml --num-gpus 8
                    --num-nodes 4 --partition gpu --timeout-hours 24 MODEL.WEIGHTS contm.pth
                    SOLVER.REFERENCE_WORLD_SIZE 8
  preview           the same with --dry-run
  sweep             submit.py --config-file ... --sweep SOLVER.BASE_LR=0.01,0.02 --sweep SEED=1,2
  compare networks  submit.py --config-file configs/imagenet/Base-plain.yaml --sweep SEED=1,2
                    --sweep MODEL.CLASSIFIER.NAME=contnet_s,resnet18
                    --only MODEL.CLASSIFIER.NAME=resnet18 "SOLVER.BASE_LR 0.05"
  status            submit.py --status output/faster_rcnn_contm
  cancel            submit.py --cancel output/faster_rcnn_contm
See docs/slurm.md for more.
"""


# --- command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Returns train_net.py's parser, with options for clusters, arrays and jobs."""
    parser = config_parser("Submits what train_net.py would run.", _EPILOG, required=False)
    add_run_options(parser)
    group = parser.add_argument_group("submission")
    group.add_argument(
        "--cluster",
        choices=("auto", "slurm", "local"),
        default="auto",
        help="where to run; default: auto, SLURM if sbatch is on PATH, otherwise this machine",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be submitted, submit and write nothing",
    )
    group.add_argument(
        "--watch", action="store_true", help="then follow the log until the job ends"
    )
    group.add_argument(
        "--no-snapshot",
        action="store_true",
        help="do not copy the code: run it as it is when the job starts",
    )
    group.add_argument(
        "--array",
        default="",
        metavar="FILE",
        help="one run for each line of arguments in this file",
    )
    group.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="one run per value; if repeated, one per combination; KEY may be config-file",
    )
    group.add_argument(
        "--only",
        nargs=2,
        action="append",
        default=[],
        metavar=("KEY=V", "'KEY VALUE ...'"),
        help="settings only for the runs of a sweep whose KEY is V",
    )
    group.add_argument(
        "--max-parallel",
        type=int,
        default=0,
        metavar="N",
        help="maximum number of runs of an array at a time",
    )
    about = group.add_mutually_exclusive_group()
    folder = {"type": partial(expand_path, key="FOLDER"), "metavar": "FOLDER"}
    about.add_argument("--status", **folder, help="show the status of a run folder's job")
    about.add_argument("--cancel", **folder, help="cancel the job of a run folder")
    add_cluster_options(parser)
    return parser


def parse_submission(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line of tools/submit.py (this process's own by default).

    Raises:
        UserError: for arguments that contradict each other.
    """
    args = build_parser().parse_intermixed_args(argv)
    check_run_options(args)
    reason = "in a job each process finds its rank and the first machine itself, remove it"
    if args.machine_rank != 0:
        raise UsageError(f"--machine-rank is for train_net.py on machines without SLURM: {reason}")
    if args.dist_url != "auto":
        raise UsageError(f"--dist-url is for train_net.py on machines without SLURM: {reason}")
    if args.max_parallel < 0:
        raise UsageError("--max-parallel must be at least 1")
    if args.max_parallel and not (args.array or args.sweep):
        raise UsageError("--max-parallel is for --array and --sweep")
    if args.resume_from and (args.array or args.sweep):
        raise UsageError("--resume-from is for a single run, not for --array and --sweep")
    if args.only and not (args.array or args.sweep):
        raise UsageError("--only is for --array and --sweep; for a single run give KEY VALUE")
    return args


# --- where it runs -------------------------------------------------------------------------------


def _choose_cluster(args: argparse.Namespace) -> str:
    present = shutil.which("sbatch") is not None
    if args.cluster == "slurm" and not present and not args.dry_run:
        raise UserError("sbatch is not on PATH: add --cluster local to run on this machine")
    if args.cluster == "auto":
        print(
            "sbatch found: submitting to SLURM (--cluster local runs on this machine)"
            if present
            else "sbatch not found: running on this machine (--cluster local)"
        )
        return "slurm" if present else "local"
    return args.cluster


def _check_slurm(
    args: argparse.Namespace, settings: ClusterSettings, runs: Sequence[Run], base: Path
):
    """Checks the requested resources, and that all nodes see the folders."""
    gpus = 0 if runs[0].cfg.MODEL.DEVICE == "cpu" else args.num_gpus
    if shutil.which("sinfo") is None and args.dry_run:
        print("SLURM is not on this machine: partitions and nodes are not checked")
        if not settings.timeout_hours:
            raise UsageError("how long may the job run? Add --timeout-hours")
        nodes = []
    else:
        nodes = check_request(read_nodes(), settings, args.num_machines, gpus, args.num_gpus)
    if "%" in str(base):
        raise UsageError(f"the run folder {base} contains a %, which SLURM replaces: rename it")
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
        raise UsageError(
            f"--num-nodes is {args.num_machines}, but without SLURM there is only this machine: "
            "use --num-nodes 1, or train_net.py on each machine (docs/training.md)"
        )
    wanted = args.num_gpus * max(1, min(args.max_parallel, len(runs)))
    for run in runs:
        check_gpu_count(run.cfg.MODEL.DEVICE, wanted, torch.cuda.device_count())


def _check_devices(runs: Sequence[Run]) -> None:
    for run in runs:
        check_device_value(run.cfg.MODEL.DEVICE, run.settings.processes.world_size)
    if len({torch.device(run.cfg.MODEL.DEVICE).type for run in runs}) > 1:
        raise UsageError("the runs of an array must all have the same MODEL.DEVICE")


# --- the submission ------------------------------------------------------------------------------


def _check_texts(plan: Submission) -> None:
    """Checks what goes to sbatch or a shell beside the settings of the cluster."""
    check_text(str(plan.base), "the run folder (OUTPUT_DIR)")
    if plan.cluster == "slurm":
        check_text(plan.job_name, "the config's name")
    for name, value in plan.environment().items():
        check_text(value, f"what the job gets as {name}")
    check_text(plan.python(), "the command that starts Python")


def _submit(args: argparse.Namespace, command: list[str]) -> bool:
    settings = read_settings(args)
    cluster = _choose_cluster(args)
    base, runs = prepare_runs(args)
    _check_devices(runs)
    if settings.signal_delay >= 3600 * settings.timeout_hours > 0:
        raise UsageError(
            f"--signal-delay {settings.signal_delay} s leaves no time of --timeout-hours "
            f"{settings.timeout_hours:g}"
        )
    if cluster == "slurm":
        _check_slurm(args, settings, runs, base)
    else:
        _check_local(args, runs)
    check_free(base)
    plan = Submission(args, settings, cluster, base, runs, next_folder(base), command)
    _check_texts(plan)
    describe(plan)
    if not plan.pending:
        return True
    if args.dry_run:
        show_dry_run(plan)
        return True
    with explaining_disk(plan.base):
        write_files(plan)
        return run_queue(plan) if plan.is_array and cluster == "local" else send(plan)


def _run(argv: Sequence[str] | None) -> int:
    args = parse_submission(argv)
    if args.cancel:
        cancel(args.cancel)
    elif args.status and args.watch:
        return 0 if follow(args.status) else 1
    elif args.status:
        print_status(args.status)
    else:
        command = [sys.argv[0], *map(redact, sys.argv[1:] if argv is None else argv)]
        return 0 if _submit(args, command) else 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of tools/submit.py.

    Args:
        argv: the command line; this process's own by default.

    Returns:
        The exit status, as in :func:`contnet.utils.command.run_command`: 0 if the run was submitted
        (and, with ``--watch``, has finished).
    """
    silence_known_warnings()
    return run_command(lambda: _run(argv))
