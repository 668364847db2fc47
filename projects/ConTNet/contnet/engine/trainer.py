"""Detectron2's training loop with gradient accumulation, mixed precision on any device, and exact
resuming.
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.metadata import describe_model
from contnet.checkpoint.names import BEST
from contnet.data.datasets.classes import dataset_class_names
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.loader import build_train_loader, to_device, waiting_for_batch
from contnet.engine.hooks import (
    BestCheckpoint,
    CheckpointBeforeEvaluation,
    CollectGarbage,
    EarlyStopping,
    EndsEarly,
    Evaluation,
    FirstProgress,
    LauncherHook,
    PeriodicCheckpoint,
    RefreshReport,
    UpdateEMA,
    ValidationLoss,
    WriteMetrics,
    any_due,
    collecting_garbage,
)
from contnet.engine.losses import read_from_all, rows_not_finite
from contnet.engine.optimizer import build_lr_scheduler, build_optimizer, set_iteration
from contnet.engine.restore import (
    loss_normalizers,
    restore_ema,
    restore_loss_normalizers,
    restore_optimizer,
    restore_scaler,
    tell_of_rest,
)
from contnet.engine.resume import Before, resumed_iteration, trainer_state
from contnet.engine.run_record import record_run
from contnet.engine.trackers import TrackerPictures, TrackerWriter, build_trackers
from contnet.engine.writers import build_writers, truncate_metrics
from contnet.evaluation.evaluate import Evaluator
from contnet.evaluation.metrics import check_best_metric, main_metric
from contnet.evaluation.progress import Progress
from contnet.evaluation.results import read_results, truncate_results
from contnet.modeling.amp import autocast, grad_scaler
from contnet.modeling.build import build_model
from contnet.modeling.classifier import ImageClassifier
from contnet.modeling.compat import fix_gradient_order, use_plain_focal_loss
from contnet.modeling.compiled import compile_encoders
from contnet.utils.errors import UserError
from contnet.utils.failures import telling_of_memory
from contnet.utils.seed import seed_everything

__all__ = ["Trainer", "wrap_ddp"]

logger = logging.getLogger(__name__)


def wrap_ddp(model: nn.Module, device: str) -> nn.Module:
    """Wraps the model in DistributedDataParallel, if the run has several processes.

    Args:
        model: model on the device of this process.
        device: MODEL.DEVICE.
    """
    # On the CPU, device_ids must be None.
    devices = None if device == "cpu" else [torch.cuda.current_device()]
    model = create_ddp_model(model, broadcast_buffers=False, device_ids=devices)
    if device == "cpu":
        fix_gradient_order(model)
    return model


class Trainer(SimpleTrainer):
    """Trains the model of a config.

    The random state of an iteration depends only on (seed, iteration, rank), and the images seen
    are counted, so a resume only needs a checkpoint that was saved between two iterations.

    Args:
        cfg: the config.
        seed: seed of the order of images and of all random state, the same on all ranks.
        launcher: hook of the launcher of this process.
        scaled: see :class:`contnet.engine.resume.Before`; saved in checkpoints.
        warnings: warnings that concern the run's results, one line each, for results.json.
    """

    def __init__(
        self,
        cfg: CfgNode,
        seed: int,
        launcher: LauncherHook | None = None,
        scaled: Mapping[str, list] | None = None,
        warnings: Sequence[str] = (),
    ):
        use_plain_focal_loss()
        dicts = load_dataset_dicts(cfg, cfg.DATASETS.TRAIN, train=True)
        metadata = describe_model(cfg, dataset_class_names(cfg, cfg.DATASETS.TRAIN))
        self.unwrapped_model = build_model(cfg)
        if cfg.SOLVER.COMPILE:
            compile_encoders(self.unwrapped_model, cfg.SOLVER.COMPILE_MEMORY_BUDGET)
        optimizer = build_optimizer(cfg, self.unwrapped_model)
        loader = build_train_loader(cfg, dicts, seed)
        super().__init__(wrap_ddp(self.unwrapped_model, cfg.MODEL.DEVICE), loader, optimizer)
        self.cfg = cfg
        self.launcher = launcher or LauncherHook()
        self.scaled_settings = dict(scaled or {})
        self.batch_sampler = loader.batch_sampler
        self.grad_accum_steps = cfg.SOLVER.GRAD_ACCUM_STEPS
        self.scaler = grad_scaler(cfg)
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.start_iter = 0
        self.done = Progress(-1)  # before the first iteration of this attempt
        self.ema = None
        self.weights_warnings = []  # about the initial weights
        self.pending_evaluation = None  # scalars and hints, if a resume starts by evaluating
        extras = {}
        if cfg.SOLVER.EMA.ENABLED:
            self.ema = ModelEmaV3(self.unwrapped_model, decay=cfg.SOLVER.EMA.DECAY)
            extras["ema"] = self.ema
        self.checkpointer = Checkpointer(
            self.unwrapped_model,
            cfg.OUTPUT_DIR,
            allow_missing=cfg.MODEL.ALLOW_MISSING_WEIGHTS,
            keep=cfg.SOLVER.CHECKPOINTS_KEPT,
            background=cfg.SOLVER.CHECKPOINT_BACKGROUND,
            model_optimizer=optimizer,
            metadata=metadata,
            guard=self.launcher.guard,
            save_to_disk=comm.is_main_process(),
            trainer=weakref.proxy(self),
            **extras,
        )
        self.evaluator = Evaluator(cfg, self.launcher.guard, metadata.classes, warnings)
        self.evaluation = Evaluation(
            cfg.TEST.EVAL_PERIOD, self.evaluate, partial(main_metric, cfg), cfg.TEST.PATIENCE
        )
        self.scheduler = build_lr_scheduler(cfg, optimizer)
        before_evaluation = losses = None
        if cfg.DATASETS.TEST:
            periods = (cfg.TEST.LOSS_PERIOD, cfg.TEST.EVAL_PERIOD)
            before_evaluation = CheckpointBeforeEvaluation(
                self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, periods
            )
            if cfg.TEST.LOSS_PERIOD:
                losses = ValidationLoss(cfg.TEST.LOSS_PERIOD, self.validation_losses)
        self._first_evaluation = losses or self.evaluation  # the hook, of those that evaluate
        self.register_hooks(
            [
                CollectGarbage(),
                hooks.IterationTimer(),
                hooks.LRScheduler(optimizer, self.scheduler),
                None if self.ema is None else UpdateEMA(self.ema),
                FirstProgress(),
                before_evaluation,
                losses,
                self.evaluation,
            ]
        )

    def evaluate(self) -> dict:
        """Evaluates the current weights (their EMA, if enabled) on the test sets.

        Test-time augmentation is slow, so it only runs after the last iteration.
        """
        tta = self.cfg.TEST.AUG.ENABLED and self.iter + 1 == self.max_iter
        storage = getattr(self, "storage", None)  # only in training
        loss, _ = storage.latest().get("total_loss", (None, 0)) if storage else (None, 0)
        with collecting_garbage(), self.launcher.evaluating():
            return self.evaluator.evaluate(
                self._evaluated_model(),
                tta=tta,
                iteration=self.iter,
                loss=loss,
                images_seen=self._images_seen(),
            )

    def validation_losses(self) -> dict[str, float]:
        """Computes the losses on the test sets, with the same weights as :meth:`evaluate`."""
        with collecting_garbage(), self.launcher.evaluating():
            return self.evaluator.losses(self._evaluated_model())

    def _draw_predictions(self) -> dict[str, np.ndarray]:
        with collecting_garbage():
            return self.evaluator.draw_predictions(self._evaluated_model())

    def _evaluated_model(self) -> nn.Module:
        return self.unwrapped_model if self.ema is None else self.ema.module

    def resume_or_load(self, checkpoint: str = "") -> None:
        """Resumes from a checkpoint; without one, starts from MODEL.WEIGHTS or random weights."""
        weights = self.cfg.MODEL.WEIGHTS
        if checkpoint:
            self._resume(checkpoint)
        elif weights:
            self.checkpointer.load_backbone(weights)
            self._warn_in_results(self.checkpointer.warnings)
            if self.ema is not None:
                self.ema.set(self.unwrapped_model)
        else:
            self._warn_of_random_weights()

    def _warn_in_results(self, lines: Sequence[str]) -> None:
        """Adds the warnings about the initial weights to all results, also after a resume."""
        self.weights_warnings = list(lines)
        self.evaluator.warnings = [*self.evaluator.warnings, *lines]

    def _resume(self, file: str) -> None:
        """Resumes from a checkpoint with the current settings; logs what the checkpoint lacks."""
        others = [key for key in self.checkpointer.checkpointables if key not in ("trainer", "ema")]
        content = self.checkpointer.load(file, others)
        before, state = Before.of(file, content, self.cfg), trainer_state(content)
        if absent := [key for key in others if key not in content]:
            logger.warning(f"{file} has no {', '.join(absent)}: it starts from scratch")
        self._restore(state, before)
        restore_ema(self.ema, self.unwrapped_model, content, file)
        tell_of_rest(content, state, others, file)
        if (scalars := content.get("unfinished")) is not None:
            hints = content.get("smoothing_hints", {})
            self.pending_evaluation = {
                name: (value, hints.get(name, False)) for name, value in scalars.items()
            }
        self._set_start(before)

    def _restore(self, state: dict, before: Before) -> None:
        self.iter = state["iteration"]
        restore_optimizer(self.optimizer, self.unwrapped_model, self.cfg, state, before)
        restore_scaler(self.scaler, state, before.file)
        restore_loss_normalizers(self.unwrapped_model, state, before.file)
        self._warn_in_results(state.get("weights_warnings", ()))
        self._restore_hooks(state, before)
        self._restore_order(state, before)
        set_iteration(self.scheduler, min(self.iter + 1, self.max_iter))

    def _restore_hooks(self, state: dict, before: Before) -> None:
        """Restores hooks, except the schedule, which always follows the config."""
        saved = {k: v for k, v in state.get("hooks", {}).items() if k != "LRScheduler"}
        TrainerBase.load_state_dict(self, {"iteration": self.iter, "hooks": saved})
        for name in {type(hook).__qualname__ for hook in self._hooks if hook.state_dict()}:
            if name not in (*saved, "LRScheduler"):
                logger.warning(f"{before.file} has no state of {name}, which starts from scratch")
        tests = list(self.cfg.DATASETS.TEST)
        if self.evaluation.best and before.config and before.config["DATASETS.TEST"] != tests:
            logger.warning("DATASETS.TEST has changed: the best evaluation so far is forgotten")
            self.evaluation.best = {}

    def _restore_order(self, state: dict, before: Before) -> None:
        """Restores the order of the images, or starts a new one."""
        if "stream" in state:
            self.batch_sampler.load_state_dict(state["stream"])
            return
        self.batch_sampler.start = (self.iter + 1) * (before.batch or self.cfg.SOLVER.IMS_PER_BATCH)
        logger.warning(
            f"{before.file} does not contain the order of its images: a new order starts, as after "
            f"{self.batch_sampler.start} images"
        )

    def _set_start(self, before: Before) -> None:
        """Sets the start iteration, from the images seen if the batch size has changed."""
        batch, pending = self.cfg.SOLVER.IMS_PER_BATCH, self.pending_evaluation is not None
        iterations, old = self.iter + 1, before.batch or batch
        self.start_iter = iterations
        images = self._images_seen()
        if old != batch:
            self.start_iter = max(resumed_iteration(images, iterations, before, self.cfg), pending)
            logger.info(
                f"After {images} images, iteration {iterations} of {old} images each becomes "
                f"iteration {self.start_iter} of {batch}"
            )
            if best := self.evaluation.best:
                # Before all later evaluations, so BestCheckpoint does not save it again.
                number = (best.get("iteration", -1) + 1) * old // batch - 1
                best["iteration"] = min(number, self.start_iter - 2)
        counts = images // batch == self.start_iter
        self.done = Progress(self.iter - pending, images - pending * old, batch if counts else 0)
        self.iter = self.start_iter - 1
        set_iteration(self.scheduler, min(self.start_iter, self.max_iter))
        test = self.cfg.TEST
        periods = (test.EVAL_PERIOD, test.LOSS_PERIOD)
        if pending and not any_due(self.iter, periods, self.max_iter):
            logger.warning(
                f"{before.file} was saved before an evaluation, which is skipped: with "
                f"TEST.EVAL_PERIOD {test.EVAL_PERIOD} and TEST.LOSS_PERIOD {test.LOSS_PERIOD} it "
                "is not due"
            )

    def _warn_of_random_weights(self) -> None:
        if isinstance(self.unwrapped_model, ImageClassifier):
            logger.info("MODEL.WEIGHTS is empty: the classifier starts from random weights")
            return
        backbone = self.unwrapped_model.backbone
        advice = ""
        if any(not parameter.requires_grad for parameter in backbone.parameters()):
            advice += "; its frozen layers stay random: set FREEZE_AT to 0"
        if any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules()):
            advice += (
                "; its FrozenBN norms stay the identity: set MODEL.CONTNET.NORM (or that of "
                "MODEL.RESNETS) to GN, SyncBN or BN"
            )
        logger.warning(
            "MODEL.WEIGHTS is empty: the backbone starts from random weights; set ImageNet "
            f"weights with MODEL.WEIGHTS FILE (docs/weights.md){advice}"
        )

    def fit(self) -> dict:
        """Trains from ``start_iter`` to the end; returns the last evaluation's metrics."""
        finished = self.start_iter >= self.max_iter or self.evaluation.is_hopeless
        if finished and self.pending_evaluation is None:
            logger.info(f"Training has finished: {self.start_iter} of {self.max_iter} iterations")
            return self._evaluate_best() if self.evaluation.is_hopeless else {}
        self.evaluator.prepare()
        check_best_metric(self.cfg)  # again, because the classes are known now
        if comm.is_main_process():
            self.checkpointer.remove_leftovers()
            guard = self.launcher.guard
            truncate_metrics(self.cfg.OUTPUT_DIR, self.done, guard)
            truncate_results(self.cfg.OUTPUT_DIR, self.done, guard)
            record_run(self.cfg, self.batch_sampler.seed, self.start_iter, guard)
        self.register_hooks([*self._output_hooks(), self.launcher])
        try:
            self.train(self.start_iter, self.max_iter)
        except EndsEarly:
            return self._evaluate_best() or self.evaluation.results
        return self.evaluation.results

    def _evaluate_best(self) -> dict:
        """Evaluates the best weights after an early end, unless results.json has the results."""
        cfg, iteration = self.cfg, self.evaluation.best.get("iteration")
        file = str(Path(cfg.OUTPUT_DIR, f"{BEST}.pth"))
        known = [(each["weights"], each["iteration"]) for each in read_results(cfg.OUTPUT_DIR)]
        if iteration is None or comm.all_gather((file, iteration) in known)[0]:
            return {}
        if not comm.all_gather(Path(file).is_file())[0]:  # it is in another run's folder
            logger.warning(f"{file} does not exist: the best weights are not evaluated at the end")
            return {}
        self.checkpointer.load(file, [], ema=self.ema is not None)
        with self.launcher.evaluating():
            return self.evaluator.evaluate(
                self.unwrapped_model, tta=cfg.TEST.AUG.ENABLED, iteration=iteration, weights=file
            )

    def _output_hooks(self) -> list:
        cfg = self.cfg
        guard, periods = self.launcher.guard, (cfg.TEST.EVAL_PERIOD, cfg.TEST.LOSS_PERIOD)
        writers, tracked = [], []
        if comm.is_main_process():
            writers = build_writers(cfg.OUTPUT_DIR, self.start_iter, self.max_iter)
            tracked = build_trackers(cfg, self.start_iter, guard)
            writers += [TrackerWriter(tracked, cfg.OUTPUT_DIR)] if tracked else []
        reports = cfg.REPORT.ENABLED and comm.is_main_process()
        return [
            TrackerPictures(tracked, cfg.TEST.EVAL_PERIOD, self._draw_predictions),
            WriteMetrics(writers, (cfg.LOG_PERIOD, *periods), guard),
            RefreshReport(cfg.OUTPUT_DIR, cfg.TEST.EVAL_PERIOD, guard) if reports else None,
            BestCheckpoint(self.checkpointer, self.evaluation),
            PeriodicCheckpoint(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD),
            EarlyStopping(self.evaluation),
        ]

    def before_train(self) -> None:
        super().before_train()
        if self.pending_evaluation is None:
            return
        self.iter = self.storage.iter = self.start_iter - 1
        for name, (value, hint) in self.pending_evaluation.items():
            # With its original hint, because the storage accepts only one hint per scalar.
            self.storage.put_scalar(name, value, smoothing_hint=hint)
        for hook in self._hooks[self._hooks.index(self._first_evaluation) :]:
            hook.after_step()

    def _steps_done(self) -> int:
        """Optimiser steps since the start or resume."""
        return self.iter + 1 - self.start_iter

    def _images_seen(self) -> int:
        """Number of images that all processes have trained on, including this iteration."""
        return self.batch_sampler.images_seen(self._steps_done())

    def run_step(self) -> None:
        """Runs an optimiser step: SOLVER.GRAD_ACCUM_STEPS forward and backward passes."""
        start = time.perf_counter()
        with waiting_for_batch(self.cfg):
            batches = [next(self._data_loader_iter) for _ in range(self.grad_accum_steps)]
        data_time = time.perf_counter() - start
        seed_everything(self.batch_sampler.seed, self.iter, comm.get_rank())
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        passes = []
        for i, batch in enumerate(batches):
            losses, total = self._backward(batch, last=i + 1 == self.grad_accum_steps)
            passes.append([*losses.values(), total])
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss / self.grad_accum_steps
        self.after_backward()
        seconds = torch.full_like(total, data_time, dtype=torch.float64)
        # The only device synchronisation in a step, except the scaler's; all ranks get all losses.
        tables = read_from_all([*passes, [*sums.values(), seconds]])
        self._check_finite(tables[:, :-1], list(sums), batches)
        self._put_losses(tables[:, -1], list(sums))
        self.storage.put_scalar("images_seen", self._images_seen(), smoothing_hint=False)
        self._write_memory()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _write_memory(self) -> None:
        """Adds the main process's peak memory so far to the metrics, in MiB."""
        if torch.device(self.cfg.MODEL.DEVICE).type == "cuda":
            name, memory = "gpu_memory_mb", torch.cuda.max_memory_allocated() / 2**20
        else:  # Linux counts in KiB
            name, memory = "host_memory_mb", getrusage(RUSAGE_SELF).ru_maxrss / 2**10
        self.storage.put_scalar(name, memory, smoothing_hint=False)

    def _put_losses(self, tables: np.ndarray, names: Sequence[str]) -> None:
        """Adds a step's losses and times to the metrics, as Detectron2's trainer does.

        Args:
            tables: (processes, losses + 1); the last column is the seconds of waiting for data.
            names: names of the losses.
        """
        self.storage.put_scalar("rank_data_time", tables[comm.get_rank(), -1])
        if not comm.is_main_process():
            return
        self.storage.put_scalar("data_time", tables[:, -1].max())  # all wait for the slowest
        means = {name: np.mean(tables[:, i]) for i, name in enumerate(names)}
        self.storage.put_scalar("total_loss", sum(means.values()))
        if len(means) > 1:
            self.storage.put_scalars(**means)

    def _backward(self, batch: Sequence[dict], last: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Adds a batch's gradients; the processes exchange gradients after the last batch.

        Returns:
            The batch's losses, and their sum divided by the number of passes, on the device.
        """
        waiting = not last and self.model is not self.unwrapped_model
        unsynced = self.model.no_sync() if waiting else contextlib.nullcontext()
        with telling_of_memory(self.iter, batch), unsynced:
            batch = to_device(batch, self.cfg.MODEL.DEVICE)
            with autocast(self.cfg):
                losses = self._losses(batch)
                total = sum(losses.values()) / self.grad_accum_steps
            self.scaler.scale(total).backward()
        return {name: loss.detach() for name, loss in losses.items()}, total.detach()

    def _losses(self, batch: Sequence[dict]) -> dict[str, Tensor]:
        try:
            return self.model(batch)
        except FloatingPointError as error:  # from Detectron2's proposals, before the loss
            raise self._not_finite(str(error), batch) from error

    def _check_finite(
        self, tables: np.ndarray, names: Sequence[str], batches: Sequence[Sequence[dict]]
    ) -> None:
        """Raises UserError, on all ranks, if a loss of any rank is not finite.

        Args:
            tables: (processes, passes, losses + 1); the last column is their sum.
            names: names of the losses.
            batches: batches of this rank's passes.
        """
        broken = dict(rows_not_finite(tables[:, :, -1]))
        if not broken:
            return
        rank, own = comm.get_rank(), None
        if rank in broken:
            number = broken[rank]
            values = zip(names, tables[rank, number], strict=False)
            what = ", ".join(f"{name} {value:g}" for name, value in values)
            own = self._not_finite(what, batches[number])
        # All ranks need the message, because the first one to raise it ends the run.
        told = comm.all_gather(str(own or ""))
        if own is None:
            first = min(broken)
            own = UserError(f"rank {first}: {told[first]}")
            own.rank = first
        raise own

    def _not_finite(self, what: str, batch: Sequence[dict]) -> UserError:
        images = ", ".join(str(image.get("image_id", image["file_name"])) for image in batch)
        return UserError(
            f"the loss is not finite at iteration {self.iter} ({what}), images {images}: check "
            "these images' annotations, lower SOLVER.BASE_LR, or clip gradients "
            "(SOLVER.CLIP_GRADIENTS.ENABLED True)"
        )

    def state_dict(self) -> dict:
        state = super().state_dict()
        # The key is "stream" because earlier checkpoints, which can still be loaded, use it.
        state["stream"] = self.batch_sampler.state_dict(self._steps_done())
        state["grad_scaler"] = self.scaler.state_dict()
        state["loss_normalizers"] = loss_normalizers(self.unwrapped_model)
        if self.weights_warnings:
            state["weights_warnings"] = self.weights_warnings
        if self.scaled_settings:
            state["scaled_settings"] = self.scaled_settings
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Resumes from a state with the current settings; logs what the state lacks."""
        self._restore(state_dict, Before.of("the state", {"trainer": state_dict}, self.cfg))
