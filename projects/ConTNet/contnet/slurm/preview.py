"""Describes a submission before it is sent."""

from __future__ import annotations

import shlex

from contnet.data.pipeline.loader import micro_batch_size
from contnet.engine.run_record import git_commit
from contnet.slurm.executors import sbatch_text
from contnet.slurm.snapshot import list_code
from contnet.slurm.submission import Submission
from contnet.utils.text import printable, say

__all__ = ["describe", "show_dry_run"]

_SHOWN = 20  # names of each group of files


def describe(plan: Submission) -> None:
    """Prints what a submission will run, and on which machines."""
    args, cfg, runs = plan.args, plan.runs[0].cfg, plan.runs
    where = "SLURM" if plan.cluster == "slurm" else "this machine"
    device = "GPU" if plan.gpus else "process"
    nodes, tasks = args.num_machines, args.num_gpus
    say(f"{where}: {nodes} node(s) x {tasks} {device}(s)")
    if not runs[0].arguments.eval_only:
        images = micro_batch_size(cfg, nodes * tasks)
        solver, first = cfg.SOLVER, "first run: " if plan.is_array else ""
        say(
            f"{first}batch {solver.IMS_PER_BATCH} = {nodes} nodes x {tasks} processes x {images} "
            f"images x {solver.GRAD_ACCUM_STEPS} passes; learning rate {solver.BASE_LR:g}, "
            f"{solver.MAX_ITER} iterations"
        )
    if plan.is_array:
        say(f"{len(runs)} runs in {plan.base}, {plan.parallel} at a time:")
        for run in runs:
            say(f"  {run.arguments.name}{': finished, kept' * run.finished}")
    else:
        say(f"run folder {plan.base}{': finished, kept' * runs[0].finished}")
    workers = cfg.DATALOADER.NUM_WORKERS
    if plan.cluster == "slurm" and workers and not plan.settings.cpus_per_gpu:
        say(
            "no --cpus-per-gpu: each process and its loader workers (DATALOADER.NUM_WORKERS "
            f"{workers}) share the cluster's default, often one core"
        )
    _describe_code(plan)


def _describe_code(plan: Submission) -> None:
    if plan.args.no_snapshot:
        say(f"code {plan.code}, as it will be when the job starts (--no-snapshot)")
        return
    code = list_code()
    say(f"code: a copy of {len(code.files)} files of {code.root}, commit {git_commit() or 'none'}")
    parts = {
        "of them not tracked by git": code.untracked,
        "not copied: may contain a password or key": code.secret,
        "not copied: larger than 20 MiB": code.large,
        "not copied: neither tracked by git nor code or configs": code.other,
    }
    for title, names in parts.items():
        if names:
            rest = f", ... ({len(names)})" if len(names) > _SHOWN else ""
            say(f"  {title}: {', '.join(map(printable, names[:_SHOWN]))}{rest}")


def show_dry_run(plan: Submission) -> None:
    """Prints what would be written and submitted."""
    say("dry run: nothing is submitted or written")
    say(f"would create {plan.folder} with the code, each run's full config, pickles and logs")
    if plan.cluster == "slurm":
        text = sbatch_text(plan.slurm_executor(), len(plan.pending))
        say("would give this to sbatch:", "", *text.split("\n"))
    else:
        lines = [f"export {name}={shlex.quote(v)}" for name, v in plan.environment().items()]
        say("would run here, with", *lines, *plan.settings.setup)
        say(f"{plan.args.num_gpus} x {plan.python()} -u -m submitit.core._submit {plan.folder}")
    for run in plan.pending:
        say(f"{run.arguments.name or 'training'}: {plan.job(run)}")
    settings = plan.settings
    network = f", on network {settings.interface}" if settings.interface else ""
    say(
        f"requeued at most {settings.max_requeues} times, ended after "
        f"{settings.hang_timeout:g} s without progress{network}"
    )
