"""Hooks around the training step. Their order in the trainer matters: evaluation, then metrics,
then checkpoints, so that a checkpoint's metrics are on the disk before it is saved.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from timm.utils import ModelEmaV3
from torch import nn

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.names import BEST, FINAL, numbered_name
from contnet.engine.run_page import write_run_page
from contnet.utils.errors import UserError
from contnet.utils.files import NO_GUARD, WriteGuard

__all__ = [
    "BestCheckpoint",
    "CheckpointBeforeEvaluation",
    "CollectGarbage",
    "EarlyStopping",
    "EndsEarly",
    "Evaluation",
    "FirstProgress",
    "LauncherHook",
    "PeriodicCheckpoint",
    "RefreshReport",
    "UpdateEMA",
    "ValidationLoss",
    "WriteMetrics",
    "any_due",
    "collecting_garbage",
    "is_due",
]

logger = logging.getLogger(__name__)

# Maximum share of the training's time for updates of the report page.
_REPORT_SHARE = 0.02


def is_due(iteration: int, period: int, max_iter: int) -> bool:
    """Whether an action is due after ``iteration``: every period (0: never), and at the end."""
    return iteration + 1 == max_iter or (period > 0 and (iteration + 1) % period == 0)


def any_due(iteration: int, periods: Sequence[int], max_iter: int) -> bool:
    """Whether an action of any of the periods is due after ``iteration``, as in :func:`is_due`."""
    return any(is_due(iteration, period, max_iter) for period in periods)


@contextlib.contextmanager
def collecting_garbage() -> Iterator[None]:
    """Context in which Python collects garbage as usual, also during a training."""
    enabled = gc.isenabled()
    gc.enable()
    try:
        yield
    finally:
        if not enabled:
            gc.disable()


class CollectGarbage(HookBase):
    """Collects garbage after the same iterations on all ranks, and never otherwise.

    By default, each rank would collect at different times, and the others would wait for it. This
    must be the first hook, so that it restores Python's state even if another hook fails at the
    end.

    Args:
        period: period in iterations.
    """

    def __init__(self, period: int = 100):
        # Measured: steps of the shipped models leave no reference cycles, so collections may be
        # rare. They should not be rarer, because other models may leave tensors in GPU memory.
        self.period = period

    def before_train(self) -> None:
        self.enabled = gc.isenabled()
        gc.collect()
        gc.freeze()  # collections skip the objects that live as long as the training
        gc.disable()

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            gc.collect()

    def after_train(self) -> None:
        gc.unfreeze()
        if self.enabled:
            gc.enable()


class UpdateEMA(HookBase):
    """Updates the exponential moving average (EMA) of the weights."""

    def __init__(self, ema: ModelEmaV3):
        self.ema = ema

    def after_step(self) -> None:
        self.ema.update(self.trainer.unwrapped_model)


class Evaluation(HookBase):
    """Evaluates every period and after the last iteration, and remembers the best evaluation.

    Checkpoints save its state under the name of this class.

    Args:
        period: period in iterations; 0 to evaluate only at the end.
        function: returns the metrics by task, on the main process.
        choose: selects the main metric among all metrics; returns "" for none.
        patience: the training ends after this many consecutive evaluations without a better one; 0:
            no early stopping.

    Attributes:
        results: metrics of the last evaluation, on the main process.
        best: metric, value and iteration of the best evaluation, and the number of evaluations
            after it.
    """

    def __init__(
        self,
        period: int,
        function: Callable[[], dict],
        choose: Callable[[Mapping[str, float]], str],
        patience: int = 0,
    ):
        self.period = period
        self.function = function
        self.choose = choose
        self.patience = patience
        self.results = {}
        self.best = {}

    @property
    def is_hopeless(self) -> bool:
        """Whether the training ends, or has ended, before its last iteration."""
        return 0 < self.patience <= self.best.get("waited", 0)

    def after_step(self) -> None:
        if not is_due(self.trainer.iter, self.period, self.trainer.max_iter):
            return
        self.results = self.function()
        flat = flatten_results_dict(self.results)
        if flat:
            scalars = {key: float(value) for key, value in flat.items()}
            self.trainer.storage.put_scalars(**scalars, smoothing_hint=False)
            self._compare(scalars)
        self.best = comm.all_gather(self.best)[0]
        if self.is_hopeless:
            # The actions of the last iteration are due now.
            self.trainer.max_iter = self.trainer.iter + 1

    def _compare(self, scalars: Mapping[str, float]) -> None:
        metric = self.choose(scalars)
        if not metric:
            return
        if metric != self.best.get("metric"):  # the metric has changed since a resume
            self.best = {}
        value = scalars[metric]
        if value > self.best.get("value", -math.inf):  # never true for NaN
            self.best = {"metric": metric, "value": value, "iteration": self.trainer.iter}
        else:
            self.best = {"metric": metric, **self.best, "waited": self.best.get("waited", 0) + 1}

    def state_dict(self) -> dict:
        return dict(self.best)

    def load_state_dict(self, state_dict: dict) -> None:
        self.best = dict(state_dict)


class CheckpointBeforeEvaluation(HookBase):
    """Saves a checkpoint before what may fail: evaluations and validation losses.

    A resume from such a checkpoint starts with what was due. The file is deleted once a later
    checkpoint exists, unless it is a periodic one.

    Args:
        checkpointer: the checkpointer, which saves only on the main process.
        period: period of checkpoints, in iterations.
        periods: periods of :class:`ValidationLoss` and :class:`Evaluation`, the next hooks, in
            iterations.
    """

    def __init__(self, checkpointer: Checkpointer, period: int, periods: Sequence[int]):
        self.checkpointer = checkpointer
        self.period = period
        self.periods = periods

    def after_step(self) -> None:
        trainer, iteration = self.trainer, self.trainer.iter
        if not any_due(iteration, self.periods, trainer.max_iter):
            return
        # The values in metrics.json; the median if several passes of an iteration put a scalar.
        latest = trainer.storage.latest_with_smoothing_hint(window_size=1)
        hints = trainer.storage.smoothing_hints()
        scalars = {key: float(value) for key, (value, i) in latest.items() if i == iteration}
        final = iteration + 1 == trainer.max_iter
        self.checkpointer.save(
            numbered_name(iteration),
            temporary=final or not is_due(iteration, self.period, trainer.max_iter),
            unfinished=scalars,
            smoothing_hints={key: hints[key] for key in scalars},
        )
        self.checkpointer.wait()
        comm.synchronize()


class ValidationLoss(HookBase):
    """Adds the losses on the test sets to the metrics, every period and after the last iteration.

    Args:
        period: period in iterations, above 0.
        function: returns the losses by name, on all processes.
    """

    def __init__(self, period: int, function: Callable[[], dict[str, float]]):
        self.period = period
        self.function = function

    def after_step(self) -> None:
        if is_due(self.trainer.iter, self.period, self.trainer.max_iter):
            self.trainer.storage.put_scalars(**self.function(), smoothing_hint=False)


class FirstProgress(HookBase):
    """Logs the first iteration of a run, since the next progress line may take minutes."""

    def before_step(self) -> None:
        self.start = time.perf_counter()

    def after_step(self) -> None:
        trainer = self.trainer
        if trainer.iter != trainer.start_iter or not comm.is_main_process():
            return
        seconds = time.perf_counter() - self.start
        left = datetime.timedelta(seconds=int(seconds * (trainer.max_iter - trainer.iter - 1)))
        latest = trainer.storage.latest()
        losses = "  ".join(f"{k}: {v:.4g}" for k, (v, _) in latest.items() if "loss" in k)
        logger.info(
            f"eta: {left}  iter: {trainer.iter}  {losses}  time: {seconds:.4f}  (first iteration "
            "only, which takes longer than later ones; losses are not smoothed)"
        )


class WriteMetrics(HookBase):
    """Writes metrics after each of several periods, and at the end.

    Args:
        writers: Detectron2's event writers; only on the main process.
        periods: periods of progress, evaluations and validation losses, in iterations.
        guard: called before anything is written.
    """

    def __init__(
        self,
        writers: list[EventWriter],
        periods: Sequence[int],
        guard: WriteGuard = NO_GUARD,
    ):
        self.writers = writers
        self.periods = periods
        self.guard = guard

    def after_step(self) -> None:
        trainer = self.trainer
        if any_due(trainer.iter, self.periods, trainer.max_iter):
            self.guard.check()
            for writer in self.writers:
                writer.write()

    def after_train(self) -> None:
        for writer in self.writers:
            writer.close()


class RefreshReport(HookBase):
    """Updates the run's report page after each evaluation and at the end.

    An update is skipped if the updates so far have taken more than 2 % of the training's time.

    Args:
        folder: folder of the run.
        evaluation_period: period of :class:`Evaluation`, in iterations.
        guard: called before the page is written.
    """

    def __init__(self, folder: str, evaluation_period: int, guard: WriteGuard = NO_GUARD):
        self.folder = Path(folder)
        self.evaluation_period = evaluation_period
        self.guard = guard
        self.seconds = 0.0
        self.start = time.perf_counter()

    def after_step(self) -> None:
        trainer, now = self.trainer, time.perf_counter()
        if not is_due(trainer.iter, self.evaluation_period, trainer.max_iter):
            return
        last = trainer.iter + 1 == trainer.max_iter
        if not last and self.seconds > _REPORT_SHARE * (now - self.start):
            return
        try:
            write_run_page(self.folder, self.guard)
        except OSError as error:
            logger.warning(f"The report page is not updated: {error}")
        self.seconds += time.perf_counter() - now


class PeriodicCheckpoint(HookBase):
    """Saves ``model_<iteration>`` every period and ``model_final`` after the last iteration.

    Errors of background writes are raised after the next iteration; the training waits for all
    writes at its end.

    Args:
        checkpointer: the checkpointer, which saves only on the main process.
        period: period in iterations.
    """

    def __init__(self, checkpointer: Checkpointer, period: int):
        self.checkpointer = checkpointer
        self.period = period

    def after_step(self) -> None:
        self.checkpointer.check()
        iteration = self.trainer.iter
        if not is_due(iteration, self.period, self.trainer.max_iter):
            return
        final = iteration + 1 == self.trainer.max_iter
        name = FINAL if final else numbered_name(iteration)
        self.checkpointer.save(name, iteration=iteration)

    def after_train(self) -> None:
        try:
            self.checkpointer.wait()
        except UserError as error:
            if self.trainer.iter == self.trainer.max_iter:
                raise
            logger.error(str(error))  # the training has ended with another error


class BestCheckpoint(HookBase):
    """Saves ``model_best`` after each evaluation that is better than all before it.

    Args:
        checkpointer: the checkpointer, which saves only on the main process.
        evaluation: the earlier hook that stores the best evaluation.
    """

    def __init__(self, checkpointer: Checkpointer, evaluation: Evaluation):
        self.checkpointer = checkpointer
        self.evaluation = evaluation

    def after_step(self) -> None:
        best = self.evaluation.best
        if best.get("iteration") == self.trainer.iter:
            logger.info(f"The best {best['metric']} so far: {best['value']:.2f}")
            self.checkpointer.save(BEST, iteration=self.trainer.iter)


class EndsEarly(BaseException):
    """Raised on all ranks to leave the training loop before its last iteration."""


class EarlyStopping(HookBase):
    """Ends a training when its evaluations stop improving.

    Args:
        evaluation: the earlier hook that stores the best evaluation.
    """

    def __init__(self, evaluation: Evaluation):
        self.evaluation = evaluation

    def after_step(self) -> None:
        trainer = self.trainer
        if self.evaluation.is_hopeless:
            best = self.evaluation.best
            logger.warning(
                f"The training ends early, after iteration {trainer.iter}: {best['waited']} "
                f"evaluations without a {best['metric']} above {best.get('value', math.nan):.2f}"
            )
            trainer.iter += 1  # as after the last iteration
            raise EndsEarly


class LauncherHook(HookBase):
    """The hook of a launcher, which runs after all other hooks; this base class does nothing.

    Attributes:
        guard: called before anything is written to the run's folder.
    """

    guard: WriteGuard = NO_GUARD

    def watch(self, model: nn.Module) -> None:
        """Called for each model before it runs, also with --eval-only."""

    def evaluating(self) -> contextlib.AbstractContextManager:
        """Returns a context that each process enters for each evaluation during training."""
        return contextlib.nullcontext()
