"""The command train_net.py."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence
from functools import partial

import torch
from detectron2.utils import comm

from contnet.engine.interruption import Interruption, SaveOnSignal
from contnet.launch.arguments import RunSettings, build_run_settings, parse_arguments
from contnet.launch.distributed import launch_run
from contnet.launch.preflight import check_run
from contnet.launch.run import run
from contnet.modeling.compat import silence_known_warnings
from contnet.utils.command import run_command
from contnet.utils.errors import UserError
from contnet.utils.failures import lost_contact

__all__ = ["main", "train"]

# Seconds within which the parent of spawned ranks notices that one ended, and ends the others.
_LINGER = 10.0


def _contact_lost(error: BaseException) -> UserError:
    """Returns the error of a rank that cannot continue because another rank has ended."""
    said = re.search(r"Connection closed by peer \S+\d|Connection reset by peer", str(error))
    return UserError(
        f"rank {comm.get_rank()} on {socket.gethostname()} lost contact with another rank"
        f"{f' ({said[0]})' if said else ''}, which has ended: see the log of that rank, or of its "
        "launcher"
    )


def _run_interruptible(settings: RunSettings) -> None:
    """Runs one process of a run; on a signal, it saves a checkpoint before it ends."""
    with Interruption() as listener:
        try:
            run(settings, SaveOnSignal(listener))
        except Exception as error:  # PyTorch raises RuntimeErrors of many kinds
            if not lost_contact(error):
                raise
            listener.saving = False
            if listener.is_spawned:
                if listener.number:
                    listener.interrupt()
                time.sleep(_LINGER)  # usually ended by the parent's signal
            raise _contact_lost(error) from error


def train(argv: Sequence[str] | None = None) -> None:
    """Trains or evaluates with the command line of train_net.py; call it in ``run_command``.

    Args:
        argv: the command line, this process's own by default.

    Raises:
        UserError: for user errors, and other errors with a one-line message.
        Interrupted: if a signal has ended the run.
        SystemExit: if a spawned process failed and logged its error.
    """
    settings = check_run(build_run_settings(parse_arguments(argv)))
    device = torch.device(settings.cfg.MODEL.DEVICE).type
    launch_run(_run_interruptible, settings, settings.processes, device)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of train_net.py.

    Args:
        argv: the command line, this process's own by default.

    Returns:
        The exit status, as in :func:`contnet.utils.command.run_command`.
    """
    silence_known_warnings()
    return run_command(partial(train, argv))
