"""The training loop: Detectron2's, with gradient accumulation, mixed precision on any device, and
a resume that is exact.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
import weakref
from functools import partial
from resource import RUSAGE_SELF, getrusage

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, create_ddp_model, hooks
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.metadata import describe_model
from contnet.checkpoint.names import numbered_name
from contnet.data.datasets.classes import dataset_class_names
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.loader import build_train_loader
from contnet.engine.hooks import (
    BestCheckpoint,
    Evaluation,
    LauncherHook,
    PeriodicCheckpoint,
    UpdateEMA,
    WriteMetrics,
)
from contnet.engine.optimizer import build_lr_scheduler, build_optimizer
from contnet.engine.run_record import record_run
from contnet.engine.writers import build_writers, truncate_metrics
from contnet.evaluation.evaluate import Evaluator
from contnet.evaluation.metrics import main_metric
from contnet.evaluation.results import truncate_results
from contnet.modeling.amp import autocast, grad_scaler
from contnet.modeling.build import build_model
from contnet.modeling.classifier import ImageClassifier
from contnet.modeling.compat import fix_gradient_order, use_plain_focal_loss
from contnet.utils.errors import UserError
from contnet.utils.seed import seed_everything

__all__ = ["Trainer", "wrap_ddp"]

logger = logging.getLogger(__name__)


def _loss_normalizers(model: nn.Module) -> dict[str, float]:
    """Running loss normalisers of dense detectors, which are plain attributes in Detectron2."""
    return {
        name: float(module.loss_normalizer)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "loss_normalizer", None), (int, float))
    }


def wrap_ddp(model: nn.Module, device: str) -> nn.Module:
    """The model as all processes of the run train it together; itself, if there is only one.

    Args:
        model: on the device of this process.
        device: MODEL.DEVICE.
    """
    # Without device_ids a module on the CPU can be distributed too.
    devices = None if device == "cpu" else [torch.cuda.current_device()]
    model = create_ddp_model(model, broadcast_buffers=False, device_ids=devices)
    if device == "cpu":
        fix_gradient_order(model)
    return model


class Trainer(SimpleTrainer):
    """Trains what a config describes.

    The random state of an iteration depends on (seed, iteration, rank) alone and the position of
    the batch sampler is counted, so a checkpoint taken between two iterations is all that a resume
    needs.

    Args:
        cfg: the config.
        seed: of the order of images and of all random state, the same on all ranks.
        launcher: what the launcher of this process adds.
    """

    def __init__(self, cfg: CfgNode, seed: int, launcher: LauncherHook | None = None):
        use_plain_focal_loss()
        dicts = load_dataset_dicts(cfg, cfg.DATASETS.TRAIN, train=True)
        metadata = describe_model(cfg, dataset_class_names(cfg, cfg.DATASETS.TRAIN))
        self.unwrapped_model = build_model(cfg)
        optimizer = build_optimizer(cfg, self.unwrapped_model)
        loader = build_train_loader(cfg, dicts, seed)
        super().__init__(wrap_ddp(self.unwrapped_model, cfg.MODEL.DEVICE), loader, optimizer)
        self.cfg = cfg
        self.launcher = launcher or LauncherHook()
        self.batch_sampler = loader.batch_sampler
        self.grad_accum_steps = cfg.SOLVER.GRAD_ACCUM_STEPS
        self.scaler = grad_scaler(cfg)
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.start_iter = 0
        self.ema = None
        self.pending_evaluation = None  # scalars with their smoothing hints, to evaluate first
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
        self.evaluator = Evaluator(cfg, self.launcher.guard, metadata.classes)
        self.evaluation = Evaluation(cfg.TEST.EVAL_PERIOD, self.evaluate, partial(main_metric, cfg))
        self.register_hooks(
            [
                hooks.IterationTimer(),
                hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer)),
                None if self.ema is None else UpdateEMA(self.ema),
                self.evaluation,
            ]
        )

    def evaluate(self) -> dict:
        """Metrics of the present weights (their EMA, if one is kept) on the test sets.

        Test-time augmentation takes so long that it waits for the last iteration.
        """
        model = self.unwrapped_model if self.ema is None else self.ema.module
        tta = self.cfg.TEST.AUG.ENABLED and self.iter + 1 == self.max_iter
        with self.launcher.evaluating():
            return self.evaluator.evaluate(model, iteration=self.iter, tta=tta)

    def resume_or_load(self, resume: bool) -> None:
        """Resumes from the run's folder, or starts from MODEL.WEIGHTS or random weights."""
        weights = self.cfg.MODEL.WEIGHTS
        if resume and self.checkpointer.has_checkpoint():
            file = self.checkpointer.get_checkpoint_file()
            content = self.checkpointer.load(file)
            self._resume_ema(content, file)
            if (scalars := content.get("unfinished")) is not None:
                hints = content.get("smoothing_hints", {})
                self.pending_evaluation = {
                    name: (value, hints.get(name, False)) for name, value in scalars.items()
                }
            self.start_iter = self.iter + 1
        elif weights:
            self.checkpointer.load_backbone(weights)
            if self.ema is not None:
                self.ema.set(self.unwrapped_model)
        else:
            self._warn_of_random_weights()

    def _resume_ema(self, content: dict, file: str) -> None:
        """Starts an EMA that the checkpoint does not have from its weights."""
        if self.ema is not None and "ema" not in content:
            self.ema.set(self.unwrapped_model)
            logger.warning(f"{file} has no EMA: it starts from the last weights")
        elif self.ema is None and "ema" in content:
            logger.warning(f"{file} has an EMA, which ends here: SOLVER.EMA.ENABLED is False")

    def _warn_of_random_weights(self) -> None:
        if isinstance(self.unwrapped_model, ImageClassifier):
            logger.info("MODEL.WEIGHTS is empty: the classifier starts from random weights")
            return
        backbone = self.unwrapped_model.backbone
        advice = ""
        if any(not parameter.requires_grad for parameter in backbone.parameters()):
            advice += "; its frozen layers will stay random: set FREEZE_AT to 0"
        if any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules()):
            advice += (
                "; its FrozenBN norms stay the identity: set MODEL.CONTNET.NORM (or that of "
                "MODEL.RESNETS) to GN, SyncBN or BN"
            )
        logger.warning(
            "MODEL.WEIGHTS is empty: the backbone starts from random weights; give ImageNet "
            f"weights by MODEL.WEIGHTS FILE (docs/weights.md){advice}"
        )

    def fit(self) -> dict:
        """Trains from ``start_iter`` to the end; returns the last evaluation's metrics."""
        if self.start_iter >= self.max_iter and self.pending_evaluation is None:
            logger.info(f"Training has finished: {self.start_iter} of {self.max_iter} iterations")
            return {}
        if comm.is_main_process():
            self.checkpointer.remove_leftovers()
            done = self.start_iter - 1 - (self.pending_evaluation is not None)
            guard = self.launcher.guard
            truncate_metrics(self.cfg.OUTPUT_DIR, done, guard)
            truncate_results(self.cfg.OUTPUT_DIR, done, guard)
            record_run(self.cfg, self.batch_sampler.seed, self.start_iter, guard)
        self.register_hooks([*self._output_hooks(), self.launcher])
        self.train(self.start_iter, self.max_iter)
        return self.evaluation.results

    def _output_hooks(self) -> list:
        cfg = self.cfg
        writers = []
        if comm.is_main_process():
            writers = build_writers(cfg.OUTPUT_DIR, self.start_iter, self.max_iter)
        return [
            WriteMetrics(writers, cfg.LOG_PERIOD, cfg.TEST.EVAL_PERIOD, self.launcher.guard),
            BestCheckpoint(self.checkpointer, self.evaluation),
            PeriodicCheckpoint(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD),
        ]

    def save_before_evaluation(self) -> None:
        """Saves between the step of an iteration and its evaluation, which a resume then begins."""
        latest = self.storage.latest()
        scalars = {key: float(value) for key, (value, i) in latest.items() if i == self.iter}
        hints = self.storage.smoothing_hints()
        self.checkpointer.save(
            numbered_name(self.iter),
            unfinished=scalars,
            smoothing_hints={key: hints[key] for key in scalars},
        )

    def before_train(self) -> None:
        super().before_train()
        if self.pending_evaluation is None:
            return
        self.iter = self.storage.iter = self.start_iter - 1
        for name, (value, hint) in self.pending_evaluation.items():
            # As the later iterations put it, for the storage takes no other.
            self.storage.put_scalar(name, value, smoothing_hint=hint)
        for hook in self._hooks[self._hooks.index(self.evaluation) :]:
            hook.after_step()

    def _batches_done(self) -> int:
        return (
            self.batch_sampler.batches + (self.iter + 1 - self.start_iter) * self.grad_accum_steps
        )

    def run_step(self) -> None:
        """One optimiser step, over SOLVER.GRAD_ACCUM_STEPS forward and backward passes."""
        start = time.perf_counter()
        batches = [next(self._data_loader_iter) for _ in range(self.grad_accum_steps)]
        data_time = time.perf_counter() - start
        seed_everything(self.batch_sampler.seed, self.iter, comm.get_rank())
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            for name, loss in self._backward(batch, last=i + 1 == self.grad_accum_steps).items():
                sums[name] = sums.get(name, 0) + loss / self.grad_accum_steps
        self.after_backward()
        self._write_metrics(sums, data_time)
        self.storage.put_scalar(
            "images_seen",
            self.batch_sampler.images_before(self._batches_done()),
            smoothing_hint=False,
        )
        self._write_memory()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _write_memory(self) -> None:
        """Puts the main process's peak of memory so far into the metrics, in MiB."""
        if torch.device(self.cfg.MODEL.DEVICE).type == "cuda":
            name, memory = "gpu_memory_mb", torch.cuda.max_memory_allocated() / 2**20
        else:  # Linux counts in KiB
            name, memory = "host_memory_mb", getrusage(RUSAGE_SELF).ru_maxrss / 2**10
        self.storage.put_scalar(name, memory, smoothing_hint=False)

    def _backward(self, batch: list[dict], last: bool) -> dict[str, Tensor]:
        """Adds a batch's gradients, which processes exchange after the last one; its losses."""
        waiting = not last and self.model is not self.unwrapped_model
        with self.model.no_sync() if waiting else contextlib.nullcontext():
            with autocast(self.cfg):
                losses = self._losses(batch)
                total = sum(losses.values()) / self.grad_accum_steps
            self._check_finite(total, losses, batch)
            self.scaler.scale(total).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _losses(self, batch: list[dict]) -> dict[str, Tensor]:
        try:
            return self.model(batch)
        except FloatingPointError as error:  # Detectron2's proposals are made before the loss
            raise self._not_finite(str(error), batch) from error

    def _check_finite(self, total: Tensor, losses: dict[str, Tensor], batch: list[dict]) -> None:
        if math.isfinite(total.item()):
            return
        values = ", ".join(f"{name} {loss.item():g}" for name, loss in losses.items())
        raise self._not_finite(values, batch)

    def _not_finite(self, what: str, batch: list[dict]) -> UserError:
        images = ", ".join(str(image.get("image_id", image["file_name"])) for image in batch)
        return UserError(
            f"the loss is not finite at iteration {self.iter} ({what}), images {images}: look at "
            "these images' annotations, lower SOLVER.BASE_LR, or clip gradients "
            "(SOLVER.CLIP_GRADIENTS.ENABLED True)"
        )

    def state_dict(self) -> dict:
        state = super().state_dict()
        # Named so since the first checkpoints, which still load.
        state["stream"] = self.batch_sampler.state_dict(self._batches_done())
        state["grad_scaler"] = self.scaler.state_dict()
        state["loss_normalizers"] = _loss_normalizers(self.unwrapped_model)
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.batch_sampler.load_state_dict(state_dict["stream"])
        if self.scaler.is_enabled() and state_dict["grad_scaler"]:
            self.scaler.load_state_dict(state_dict["grad_scaler"])
        for name, value in state_dict["loss_normalizers"].items():
            self.unwrapped_model.get_submodule(name).loss_normalizer = value
