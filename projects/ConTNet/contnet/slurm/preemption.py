"""What a job adds to a training, so that it leaves in order when it is signalled."""

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
    """Ends the training loop, of all ranks, after the checkpoint of a signalled job."""


class Preemption(SavingHook):
    """Tells the watcher how the training goes; saves and leaves when a rank was signalled.

    At least one iteration is done in each attempt, so that signals alone cannot keep a job from
    going forward.

    Args:
        watcher: of this process, which has joined the run's others.
        lease: of the run.
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
        # By the backbone, where there is one: test-time augmentation calls it, too.
        seen = getattr(model, "backbone", model)
        seen.register_forward_pre_hook(lambda *_: self.watcher.progress())

    def after_step(self) -> None:
        trainer = self.trainer
        self.watcher.progress(trainer.iter)
        if is_due(trainer.iter, trainer.cfg.TEST.EVAL_PERIOD, trainer.max_iter):
            self.save()  # a later attempt need not evaluate again
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
