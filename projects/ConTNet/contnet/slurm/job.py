"""The callable that submitit runs in every task of a job: a training that survives preemption."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, fields

from submitit.helpers import DelayedSubmission

from contnet.modeling.compat import silence_known_warnings

__all__ = ["TrainingJob", "python_command"]

# Both signals are blocked until the job can handle them: during imports, they would kill Python.
_HOLD_SIGNALS = (
    "import os, signal, sys; "
    "signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR2, signal.SIGTERM)); "
    "os.execv(sys.executable, [sys.executable] + sys.argv[1:])"
)


def python_command() -> str:
    """Returns the shell command that starts Python (``python=`` of submitit's executors)."""
    return shlex.join([sys.executable, "-I", "-S", "-c", _HOLD_SIGNALS])


@dataclass
class TrainingJob:
    """A training with one task per GPU; picklable, and the same object in every attempt.

    It requires ``srun --kill-on-bad-exit=1``, tasks in blocks (SLURM's default), ``sbatch
    --requeue`` and submitit's ``signal_delay_s``.

    Attributes:
        config_file: a full config, finished for the job's processes: the ``dump()`` of what
            :func:`contnet.launch.arguments.configure` returns. Each attempt reads it unchanged. Its
            paths are absolute.
        run_folder: OUTPUT_DIR; the job's files are in its ``slurm`` folder.
        num_gpus: processes per machine.
        resume: resume from the last checkpoint in the first attempt, too; later attempts always do.
        eval_only: only evaluate.
        notes: lines for the log, such as those of ``configure``.
        max_requeues: maximum number of attempts after the first, for any reason.
        hang_timeout: seconds without progress after which the job ends.
        interface: network interface for NCCL and gloo; "" for their default.
        signal_delay: seconds from SLURM's first signal to the end; submitit's signal_delay_s.
        heartbeat_interval: seconds between heartbeats; longer with many ranks.
    """

    config_file: str
    run_folder: str
    num_gpus: int = 1
    resume: bool = False
    eval_only: bool = False
    notes: tuple[str, ...] = ()
    max_requeues: int = 20
    hang_timeout: float = 1800
    interface: str = ""
    signal_delay: float = 90
    heartbeat_interval: float = 5

    def __call__(self) -> dict:
        """Trains or evaluates; returns the last evaluation's metrics (on rank 0).

        Raises:
            SystemExit: when a signal ends this attempt.
            UserError: for user errors, and if the job must not be restarted.
        """
        silence_known_warnings()  # before Detectron2 is imported
        from contnet.slurm.attempt import Attempt

        names = [each.name for each in fields(TrainingJob)]  # a subclass may have more fields
        return Attempt(**{name: getattr(self, name) for name in names}).run()

    def checkpoint(self) -> DelayedSubmission:
        """Returns the callable that submitit would run after its own requeue."""
        return DelayedSubmission(self)
