"""The command line of train_net.py, options shared with other tools, and the resulting settings."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from contnet.checkpoint.reading import read_class_names
from contnet.config import is_set
from contnet.config.nodes import flatten, get_value
from contnet.data.datasets.register import class_key, register_datasets
from contnet.data.validation.classes import count_classes
from contnet.engine.resume_file import ResumeFile, choose_checkpoint
from contnet.launch.environment import Processes
from contnet.launch.epochs import ITERATION_KEYS, set_iterations, used_epoch_keys
from contnet.launch.preflight_config import load_checked_config
from contnet.utils.command import EXIT_STATUSES
from contnet.utils.errors import UsageError
from contnet.utils.text import plural

__all__ = [
    "RunSettings",
    "add_run_options",
    "build_parser",
    "build_run_settings",
    "check_run_options",
    "config_parser",
    "configure",
    "parse_arguments",
]

_EPILOG = """\
examples:
  one machine       train_net.py --config-file configs/faster_rcnn_contm.yaml --num-gpus 8
  other settings    train_net.py --config-file ... SOLVER.BASE_LR 0.01 OUTPUT_DIR ./output/slow
  two CPU processes train_net.py --config-file ... --num-gpus 2 MODEL.DEVICE cpu
  resume            train_net.py --config-file ... --resume
  resume earlier    train_net.py --config-file ... --resume-from output/run/model_0002499.pth
  evaluate          train_net.py --config-file ... --eval-only MODEL.WEIGHTS model_final.pth
  on SLURM          use tools/submit.py instead of train_net.py, see docs/slurm.md
  several machines  run the command on each, with --num-machines 2 --machine-rank 0 (or 1)
                    --dist-url tcp://FIRST_MACHINE:PORT; or torchrun train_net.py --config-file ...
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")


def config_parser(description: str, epilog: str, required: bool = True) -> argparse.ArgumentParser:
    """Builds a parser of ``--config-file FILE`` and KEY VALUE overrides, for :func:`configure`.

    Args:
        description: first text of ``--help``.
        epilog: last text of ``--help``.
        required: whether a config file is required.
    """
    parser = _Parser(
        description=description,
        epilog=f"{epilog}\n{EXIT_STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config-file", required=required, metavar="FILE", help="a yaml of configs/"
    )
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config keys and their values, in pairs"
    )
    return parser


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds Detectron2's usual options of training commands."""
    parser.add_argument(
        "--resume", action="store_true", help="resume from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument(
        "--resume-from",
        default="",
        metavar="FILE",
        help="resume from this checkpoint of the run, or of another run with the same settings; "
        "later checkpoints in OUTPUT_DIR are moved aside",
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="only evaluate: MODEL.WEIGHTS, or with --resume the last checkpoint in OUTPUT_DIR",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="GPUs per machine, one process each; with MODEL.DEVICE cpu, processes (default 1)",
    )
    parser.add_argument(
        "--num-machines", "--num-nodes", type=int, default=1, metavar="N", help="(default 1)"
    )
    parser.add_argument(
        "--machine-rank", type=int, default=0, metavar="R", help="rank of this machine, from 0"
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="tcp://HOST:PORT of the first machine; default: auto, for one machine",
    )


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of train_net.py; options and overrides may be in any order."""
    parser = config_parser("Trains and evaluates a model that a config file describes.", _EPILOG)
    add_run_options(parser)
    return parser


def check_run_options(args: argparse.Namespace) -> None:
    """Sets ``--resume`` if ``--resume-from`` is given, and checks the options.

    Raises:
        UsageError: if there is less than one GPU or machine, or for ``--resume-from`` with
            ``--eval-only``.
    """
    if args.num_gpus < 1 or args.num_machines < 1:
        raise UsageError("--num-gpus and --num-machines must be at least 1")
    if args.resume_from and args.eval_only:
        raise UsageError(
            "--resume-from resumes a training: with --eval-only use MODEL.WEIGHTS FILE"
        )
    args.resume = args.resume or bool(args.resume_from)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line (this process's own by default).

    Raises:
        UserError: for arguments that contradict each other.
    """
    args = build_parser().parse_intermixed_args(argv)
    check_run_options(args)
    if not 0 <= args.machine_rank < args.num_machines:
        raise UsageError(
            f"--machine-rank {args.machine_rank} is not one of the {args.num_machines} machines "
            f"(0 to {args.num_machines - 1})"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UsageError(
            "--num-machines requires --dist-url tcp://HOST:PORT, the address of the first machine"
        )
    return args


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run: created once, and passed to each of its processes.

    Attributes:
        cfg: the config, read, checked and completed; frozen.
        resume: whether to resume from ``checkpoint``, if there is one.
        eval_only: whether to only evaluate.
        processes: processes of the run.
        arguments: config file and overrides on the command line, for the log.
        notes: additions to the config, a line each, for the log.
        warnings: warnings that concern the run's results, a line each, for the log and
            results.json.
        scaled: keys that a resume has scaled, with their original values and batch size.
        checkpoint: checkpoint to resume from.
    """

    cfg: CfgNode = field(repr=False)
    resume: bool = False
    eval_only: bool = False
    processes: Processes = field(default_factory=Processes)
    arguments: str = ""
    notes: tuple[str, ...] = field(default=(), repr=False)
    warnings: tuple[str, ...] = field(default=(), repr=False)
    scaled: dict[str, list] = field(default_factory=dict, repr=False)
    checkpoint: ResumeFile = field(default_factory=ResumeFile, repr=False)


def _set_num_classes(
    cfg: CfgNode, config_file: str, opts: Sequence[str], eval_only: bool, resume: bool
) -> list[str]:
    """Sets the number of classes from the first data set, unless it is given; returns a note.

    An evaluation uses the number in its weights, if known, because its data may have fewer classes.
    """
    names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    key = class_key(cfg, names[0]) if names else None
    if key is None or is_set(key, config_file, opts):
        return []
    last = choose_checkpoint(cfg.OUTPUT_DIR).path if eval_only and resume else ""
    file = (last or cfg.MODEL.WEIGHTS) if eval_only else ""
    if file and (trained := read_class_names(file)):
        cfg.merge_from_list([key, len(trained)])
        return [f"{key} {len(trained)}: the number of classes of {file}"]
    number = count_classes(cfg, names[0])
    cfg.merge_from_list([key, number])
    return [f"{key} {number}: the number of classes of {names[0]}"]


def _scale(cfg: CfgNode, processes: int, epoch_keys: Sequence[str]) -> tuple[CfgNode, list[str]]:
    """Scales the recipe by SOLVER.REFERENCE_WORLD_SIZE; returns the config and a note of changes.

    The note does not list iterations that ``epoch_keys`` set, which follow from the batch size.
    """
    scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
    if scaled is not cfg:
        # Detectron2 does not scale this key, which belongs to this project.
        period = round(cfg.TEST.LOSS_PERIOD * cfg.SOLVER.REFERENCE_WORLD_SIZE / processes)
        scaled.merge_from_list(["TEST.LOSS_PERIOD", max(period, int(cfg.TEST.LOSS_PERIOD > 0))])
    ours = {ITERATION_KEYS[key] for key in epoch_keys}
    changed = [
        f"{key} {before} -> {after}"
        for key, before in flatten(cfg, cfg)
        if key not in ours and (after := get_value(scaled, key)) != before
    ]
    size = plural(processes, "process")
    return scaled, [f"scaled to {size}: {', '.join(changed)}"] if changed else []


def configure(
    config_file: str,
    opts: Sequence[str] = (),
    eval_only: bool = False,
    processes: int = 0,
    resume: bool = False,
) -> tuple[CfgNode, list[str]]:
    """Reads and completes a config, and registers its own data sets.

    Args:
        config_file: a yaml file.
        opts: ``[KEY, VALUE, KEY, VALUE, ...]``.
        eval_only: whether DATASETS.TRAIN is not used.
        processes: number of processes, for SOLVER.REFERENCE_WORLD_SIZE; 0: nothing is scaled, and
            settings in epochs are not converted.
        resume: whether the last checkpoint in OUTPUT_DIR overrides MODEL.WEIGHTS.

    Returns:
        The config, checked and not frozen; and the changes to it, a line each.

    Raises:
        UserError: for mistakes in the config, in the names of DATASETS.REGISTER, in the file that
            gives the number of classes, or, with settings in epochs, in the training sets.
    """
    cfg = load_checked_config(config_file, opts)
    register_datasets(cfg)
    notes = _set_num_classes(cfg, config_file, opts, eval_only, resume)
    epoch_keys = [] if eval_only else used_epoch_keys(cfg, config_file, opts)
    if not processes:
        return cfg, notes
    cfg, scaled = _scale(cfg, processes, epoch_keys)
    if not eval_only:
        scaled += set_iterations(cfg, epoch_keys)
    return cfg, [*notes, *scaled]


def build_run_settings(args: argparse.Namespace) -> RunSettings:
    """Builds the settings of a run from the command line of train_net.py.

    Args:
        args: from :func:`parse_arguments`.

    Raises:
        UserError: as in :func:`configure`, and for inconsistent variables of a launcher.
    """
    processes = Processes(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    cfg, notes = configure(
        args.config_file, args.opts, args.eval_only, processes.world_size, args.resume
    )
    cfg.freeze()
    arguments = shlex.join([args.config_file, *args.opts])
    checkpoint = (
        choose_checkpoint(cfg.OUTPUT_DIR, args.resume_from) if args.resume else ResumeFile()
    )
    return RunSettings(
        cfg,
        args.resume,
        args.eval_only,
        processes,
        arguments,
        tuple(notes),
        checkpoint=checkpoint,
    )
