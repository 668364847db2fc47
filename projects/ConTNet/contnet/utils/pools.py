"""Process pools that end with the command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from contnet.utils.errors import UserError
from contnet.utils.signals import end_children

__all__ = ["process_pool"]


@contextlib.contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Context with a pool of forked processes; an error in it cancels the waiting calls.

    A signal that ends the command kills the processes.

    Args:
        workers: number of processes.

    Raises:
        UserError: if a process was killed.
    """
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process of this command was killed, perhaps because the host ran out of "
                "memory: try again with fewer --workers, or on a machine with more memory"
            ) from error
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                end_children()
            raise
