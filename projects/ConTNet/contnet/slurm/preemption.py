"""Adds to a trainer what makes it leave in order when its job is signalled."""

from __future__ import annotations

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm

from contnet.checkpoint.names import numbered_name
from contnet.engine.hooks import is_due
from contnet.engine.trainer import Trainer
from contnet.slurm.watcher import Watcher

__all__ = ["Preempted", "prepare_trainer"]


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


class _Preemption(HookBase):
    """The last of all hooks: saves and leaves when a rank was signalled.

    At least one iteration is done in each attempt, so that signals alone cannot keep a job from
    going forward.
    """

    def __init__(self, watcher: Watcher):
        self.watcher = watcher
        self.vote = _Vote()

    def before_train(self) -> None:
        self.watcher.max_iter = self.trainer.max_iter
        self.watcher.iteration = self.watcher.first_iteration = self.trainer.start_iter - 1
        self.watcher.enter("training")

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


def _guard_evaluation(trainer: Trainer, watcher: Watcher) -> None:
    """Has all that an evaluation could lose saved before it begins."""
    evaluate = trainer.evaluation.function

    def guarded() -> dict:
        trainer.save_before_evaluation()
        trainer.checkpointer.wait()
        comm.synchronize()
        watcher.progress(trainer.iter)
        with watcher.evaluating():
            return evaluate()

    trainer.evaluation.function = guarded


def prepare_trainer(trainer: Trainer, watcher: Watcher) -> None:
    """Lets a watcher follow a trainer that is about to start, and end it."""
    _guard_evaluation(trainer, watcher)
    models = [trainer.unwrapped_model]
    if trainer.ema is not None:
        models.append(trainer.ema.module)
    for model in models:
        # By the backbone, where there is one: test-time augmentation calls it, too.
        seen = getattr(model, "backbone", model)
        seen.register_forward_pre_hook(lambda *_: watcher.progress())
    trainer.last_hooks.append(_Preemption(watcher))
