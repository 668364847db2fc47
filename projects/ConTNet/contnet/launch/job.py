"""What runs inside a job of SLURM's, or of submitit's stand-in on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from submitit.helpers import DelayedSubmission

__all__ = ["TrainingJob", "python_command"]


def python_command() -> str:
    """The shell command that submitit must start Python with (its ``python=``)."""
    raise NotImplementedError


@dataclass
class TrainingJob:
    """A training that survives preemption; submitit calls it in every task.

    Attributes:
        argv: train_net.py's own arguments; paths are absolute, OUTPUT_DIR is among them.
        run_folder: OUTPUT_DIR; what concerns the job lies in its ``slurm`` folder.
        max_requeues: how often the job may be started again.
        hang_timeout: seconds without progress after which the job is given up.
        interface: network interface for NCCL and gloo; "" for their own choice.
        setup: {"signal_delay": seconds between SLURM's warning and the end (default 90)}.
    """

    argv: list[str]
    run_folder: str
    max_requeues: int = 20
    hang_timeout: float = 1800
    interface: str = ""
    setup: dict = field(default_factory=dict)

    def __call__(self) -> dict:
        raise NotImplementedError

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs after a requeue."""
        return DelayedSubmission(self)
