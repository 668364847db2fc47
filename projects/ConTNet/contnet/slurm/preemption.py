"""The hook that makes the training of a job save and exit when it is signalled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

from torch import nn

from contnet.engine.hooks import is_due
from contnet.engine.interruption import SavingHook
from contnet.slurm.lease import Lease
from contnet.slurm.watcher import Watcher

__all__ = ["Preempted", "Preemption"]


class Preempted(BaseException):
    """Ends the training loop on all ranks, once a signalled job has saved its checkpoint."""


class Preemption(SavingHook):
    """Reports progress to the watcher; saves and exits when a rank has received a signal.

    Each attempt does at least one iteration, so that frequent signals cannot stop a job's progress.

    Args:
        watcher: watcher of this process; the process group must exist.
        lease: lease of the run.
    """

    def __init__(self, watcher: Watcher, lease: Lease):
        super().__init__()
        self.watcher = watcher
        self.guard = lease

    def before_train(self) -> None:
        self.watch(self.trainer.unwrapped_model)
        if self.trainer.ema is not None:
            self.watch(self.trainer.ema.module)
        self.watcher.max_iter = self.trainer.max_iter
        self.watcher.iteration = self.watcher.first_iteration = self.trainer.start_iter - 1
        self.watcher.enter("training")

    def watch(self, model: nn.Module) -> None:
        # The backbone, if there is one: test-time augmentation calls it, too.
        seen = getattr(model, "backbone", model)
        seen.register_forward_pre_hook(lambda *_: self.watcher.progress())

    def after_step(self) -> None:
        trainer = self.trainer
        self.watcher.progress(trainer.iter)
        if is_due(trainer.iter, trainer.cfg.TEST.EVAL_PERIOD, trainer.max_iter):
            self.save()  # so that a later attempt does not repeat the evaluation
        super().after_step()

    def signalled(self) -> int:
        return int(bool(self.watcher.signals))

    def leave(self, number: int) -> NoReturn:
        self.watcher.enter("preempting")
        raise Preempted

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.watcher.progress(self.trainer.iter)
        with self.watcher.evaluating():
            yield
