"""Pools of processes that end with the command."""

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
    """A pool of forked processes; an error inside leaves out what has not begun.

    A signal that ends the command kills them.

    Args:
        workers: how many.

    Raises:
        UserError: if one of them was killed.
    """
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise UserError(
                "a process that this command had started was killed, perhaps because memory ran "
                "out: try again with fewer --workers, or where there is more memory"
            ) from error
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                end_children()
            raise
