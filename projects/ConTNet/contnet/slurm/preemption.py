"""What a job adds to a training, so that it leaves in order when it is signalled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

from contnet.checkpoint.names import numbered_name
from contnet.engine.hooks import LauncherHook, is_due
from contnet.slurm.lease import Lease
from contnet.slurm.watcher import Watcher

__all__ = ["Preempted", "Preemption"]


class Preempted(BaseException):
    """Ends the training loop, of all ranks, after the checkpoint of a signalled job."""


class _Vote:
    """Whether any rank was signalled: asked after one iteration, answered after the next.

    So nobody waits for the answer, and all ranks have the same.
    """

    def __init__(self):
        self.group = None
        if comm.get_world_size() > 1:
            # On the CPU, so that no rank waits for its GPU.
            self.group = dist.new_group(backend="gloo")
        self.ballot = torch.zeros(1, dtype=torch.int32)
        self.work = None

    def answer(self) -> bool:
        if self.work is not None:
            self.work.wait()
            self.work = None
        return bool(self.ballot.item())

    def ask(self, signalled: bool) -> None:
        self.ballot.fill_(int(signalled))
        if self.group is not None:
            self.work = dist.all_reduce(
                self.ballot, dist.ReduceOp.MAX, group=self.group, async_op=True
            )


class Preemption(LauncherHook):
    """Tells the watcher how the training goes; saves and leaves when a rank was signalled.

    At least one iteration is done in each attempt, so that signals alone cannot keep a job from
    going forward.

    Args:
        watcher: of this process, which has joined the run's others.
        lease: of the run.
    """

    def __init__(self, watcher: Watcher, lease: Lease):
        self.watcher = watcher
        self.guard = lease
        self.vote = _Vote()

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
        preempted = self.vote.answer()
        if trainer.iter + 1 == trainer.max_iter:
            return
        evaluated = is_due(trainer.iter, trainer.cfg.TEST.EVAL_PERIOD, trainer.max_iter)
        saved = is_due(trainer.iter, trainer.cfg.SOLVER.CHECKPOINT_PERIOD, trainer.max_iter)
        if (preempted or evaluated) and not saved:
            trainer.checkpointer.save(numbered_name(trainer.iter), iteration=trainer.iter)
        if preempted:
            trainer.checkpointer.wait()
            self.watcher.enter("preempting")
            raise Preempted
        self.vote.ask(bool(self.watcher.signals))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.watcher.progress(self.trainer.iter)
        with self.watcher.evaluating():
            yield
