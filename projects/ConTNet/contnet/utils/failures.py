"""Explains failures that are neither user errors nor bugs: lack of memory, killed processes."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator, Sequence

import torch

from contnet.utils.errors import UserError
from contnet.utils.text import plural

__all__ = [
    "describe_death",
    "explain_failure",
    "lost_contact",
    "out_of_memory",
    "telling_of_memory",
]

_SHOWN = 4  # images of a batch in a message

_KILLED = {
    signal.SIGKILL: (
        "the host may have run out of memory (see dmesg, or the job's memory limit): lower "
        "DATALOADER.NUM_WORKERS, or ask for more memory"
    ),
    signal.SIGBUS: (
        "shared memory may be full (see df /dev/shm): lower DATALOADER.NUM_WORKERS, or give a "
        "container more (--shm-size)"
    ),
    signal.SIGSEGV: (
        "a compiled library failed, such as PyTorch, a driver or an image decoder: "
        "PYTHONFAULTHANDLER=1 shows where"
    ),
    signal.SIGABRT: (
        "a compiled library aborted, as NCCL does if another rank has died or hangs: see the "
        "lines above"
    ),
}
_LESS_GPU = (
    "lower SOLVER.IMS_PER_BATCH or raise SOLVER.GRAD_ACCUM_STEPS, use smaller images (INPUT), or "
    "SOLVER.AMP.ENABLED True"
)
_LESS_HOST = (
    "lower SOLVER.IMS_PER_BATCH, the size of the images (INPUT) or DATALOADER.NUM_WORKERS, or "
    "raise the memory limit"
)

# Messages of gloo, NCCL and PyTorch if a rank is gone.
_GONE = re.compile(
    "gloo/transport|Connection closed by peer|NCCL communicator|ncclRemoteError|"
    "remote process exited|Watchdog caught collective operation timeout"
)
_UNREACHABLE = re.compile("Connection (closed|refused|reset|timed out)")


def describe_death(number: int) -> str:
    """Describes what killed a process, and the likely cause, for a message.

    Args:
        number: number of the signal.
    """
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal
        name = f"signal {number}"
    cause = _KILLED.get(number)
    return f"killed by {name}: {cause}" if cause else f"ended by {name}"


def lost_contact(error: BaseException) -> bool:
    """Whether an error only shows that another rank is gone, or has not connected."""
    text = str(error)
    if _GONE.search(text):
        return True
    if not type(error).__name__.startswith("Dist"):
        return False
    # Most other errors of NCCL are caused on this machine: memory, two ranks on one GPU.
    return "NCCL error" not in text or bool(_UNREACHABLE.search(text))


def out_of_memory(error: BaseException) -> tuple[str, str] | None:
    """Describes an out-of-memory error.

    Returns:
        Which memory is full, and what to do; None if it is another error.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        wanted = re.search(r"Tried to allocate [\d.]+ \w+", text)
        return f"the GPU is out of memory{f' ({wanted[0]})' if wanted else ''}", _LESS_GPU
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in text or "not enough memory" in text)
    ):
        return "the host is out of memory", _LESS_HOST
    return None


@contextlib.contextmanager
def telling_of_memory(iteration: int, batch: Sequence[dict]) -> Iterator[None]:
    """Context that adds the iteration and the image sizes to an out-of-memory error.

    Args:
        iteration: iteration of the training.
        batch: the model's inputs.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (reason := out_of_memory(error)) is None:
            raise
        what, advice = reason
        sizes = ", ".join("x".join(map(str, image["image"].shape)) for image in batch[:_SHOWN])
        raise UserError(
            f"{what} at iteration {iteration}, with {plural(len(batch), 'image')} of {sizes}"
            f"{', ...' if batch[_SHOWN:] else ''}: {advice}"
        ) from error


def _loader_failure(text: str) -> str | None:
    if "Pin memory thread" in text:
        return (
            "the thread that receives the loader's batches has ended: see the lines above; if "
            "it is the limit of open files, raise the hard limit (ulimit -Hn shows it)"
        )
    if "DataLoader worker" not in text:
        return None
    killed = re.search(r"killed by signal: ([^.]*)", text)
    names = {signal.strsignal(number): number for number in signal.valid_signals()}
    number = names.get(killed[1].strip()) if killed else None
    if number is None:
        return f"a data loader worker ended without an error: {_KILLED[signal.SIGKILL]}"
    return f"a data loader worker was {describe_death(number)}"


def explain_failure(error: BaseException) -> str | None:
    """Returns one line about an out-of-memory or data loader worker error; None for others."""
    if memory := out_of_memory(error):
        return ": ".join(memory)
    return _loader_failure(str(error)) if isinstance(error, RuntimeError) else None
