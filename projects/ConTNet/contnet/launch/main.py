"""What train_net.py does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from contnet.launch.arguments import build_run_settings, parse_arguments
from contnet.launch.distributed import launch_run
from contnet.launch.preflight import check_run
from contnet.launch.run import run
from contnet.modeling.compat import silence_known_warnings
from contnet.utils.errors import UserError, print_error

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of train_net.py.

    Args:
        argv: the command line, this process's own by default.

    Returns:
        The exit status. Mistakes of the user's are one line on the error stream and status 1.
    """
    silence_known_warnings()
    try:
        settings = build_run_settings(parse_arguments(argv))
        settings = check_run(settings)
        launch_run(run, settings, settings.processes, torch.device(settings.cfg.MODEL.DEVICE).type)
    except UserError as error:
        print_error(error)
        return 1
    return 0
