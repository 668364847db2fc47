"""The loader of training batches: an endless sequence that can be resumed.

A run has one order of images (:mod:`contnet.data.pipeline.order`). Each optimiser step takes the
next SOLVER.IMS_PER_BATCH images and distributes them to the processes and their passes. The images
of a step therefore depend neither on the number of processes, passes or workers nor on their
timing, and a run is resumed from the number of images seen.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import NoReturn

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from contnet.data.pipeline.mappers import NamedErrors, build_train_mapper
from contnet.data.pipeline.order import ImageOrder
from contnet.data.pipeline.records import Records
from contnet.modeling.image_batch import ImageBatch, collate_images
from contnet.utils.errors import UsageError, UserError
from contnet.utils.seed import seed_everything
from contnet.utils.signals import end_children, outliving_signals
from contnet.utils.text import plural

__all__ = [
    "TRAIN_SAMPLERS",
    "TrainingBatchSampler",
    "build_collator",
    "build_order",
    "build_train_loader",
    "init_worker",
    "micro_batch_size",
    "pins_memory",
    "to_device",
    "waiting_for_batch",
]

TRAIN_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")

logger = logging.getLogger(__name__)


class SeededDataset(Dataset):
    """Loads (seed, position, index) triples, each with its own random state.

    Args:
        dicts: Detectron2's data set dicts; a list is serialised, :class:`Records` already are.
        mapper: converts a data set dict to a model input.
    """

    def __init__(self, dicts: Sequence[dict], mapper: Callable[[dict], dict]):
        self.dicts = dicts if isinstance(dicts, Records) else DatasetFromList(dicts, copy=False)
        self.mapper = NamedErrors(mapper)

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, item: tuple[int, int, int]) -> dict:
        seed, position, index = item
        seed_everything(seed, position)
        return self.mapper(self.dicts[index])


class TrainingBatchSampler(Sampler):
    """Yields batches of (seed, position, index) for the passes of one process, endlessly.

    Args:
        order: order of the images.
        step_size: images per optimiser step, over all processes and passes.
        passes: passes of each process per step.
        rank: rank of this process.
        world_size: number of processes; ``world_size * passes`` divides ``step_size``.
    """

    def __init__(
        self, order: ImageOrder, step_size: int, passes: int = 1, rank: int = 0, world_size: int = 1
    ):
        self.order = order
        self.step_size = step_size
        self.start = 0  # images that the run has seen before this sampler's first step
        self._size = step_size // (passes * world_size)
        # Where this process's batches begin within a step.
        self._places = range(rank * self._size, step_size, world_size * self._size)

    @property
    def seed(self) -> int:
        """Seed of order and augmentation."""
        return self.order.seed

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        items = zip(
            itertools.repeat(self.seed),
            itertools.count(self.start),
            self.order.images_from(self.start),
            strict=False,
        )
        while True:
            step = list(itertools.islice(items, self.step_size))
            for place in self._places:
                yield step[place : place + self._size]

    def images_seen(self, steps: int) -> int:
        """Returns how many images the run has seen after ``steps`` more optimiser steps."""
        return self.start + steps * self.step_size

    def _order_state(self) -> dict:
        order = self.order
        return {
            "images": order.images,
            "images_per_epoch": order.images_per_epoch,
            "group_size": order.group_size,
        }

    def state_dict(self, steps: int) -> dict:
        """Returns the state from which a run resumes after ``steps`` more optimiser steps."""
        return {"seed": self.seed, "images_seen": self.images_seen(steps), **self._order_state()}

    def load_state_dict(self, state: dict) -> None:
        """Resumes after the images that another run has seen; warns if the order differs."""
        self.order = self.order.with_seed(state["seed"])
        if "images_seen" not in state:  # from the first versions, which counted batches
            batches = state["batches"] * state["batch_size"] * state["world_size"]
            self.start = state["start"] + batches
            reason = "the checkpoint's version ordered them differently"
        else:
            self.start = state["images_seen"]
            here = self._order_state()
            changed = [key for key in here if here[key] != state[key]]
            reason = ", ".join(f"{key} {state[key]} -> {here[key]}" for key in changed)
        if reason:
            logger.warning(
                f"Resuming after {self.start} images, but their order differs from that of the "
                f"interrupted run ({reason})"
            )


def micro_batch_size(cfg: CfgNode, processes: int) -> int:
    """Returns the number of images per process and forward pass.

    Raises:
        UserError: if SOLVER.IMS_PER_BATCH is not a multiple of processes x passes.
    """
    parts = processes * cfg.SOLVER.GRAD_ACCUM_STEPS
    size, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, parts)
    if rest or size == 0:
        raise UsageError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} does not divide over {processes} "
            f"processes x SOLVER.GRAD_ACCUM_STEPS {cfg.SOLVER.GRAD_ACCUM_STEPS}: choose a multiple "
            f"of {parts}"
        )
    return size


def _is_landscape(dicts: Sequence[dict]) -> np.ndarray:
    """Returns whether each image is wider than tall, (N,)."""
    if isinstance(dicts, Records):
        sizes = dicts.sizes
    else:
        sizes = np.array([(each["width"], each["height"]) for each in dicts]).reshape(-1, 2)
    return sizes[:, 0] > sizes[:, 1]


def _repeat_factors(cfg: CfgNode, dicts: Sequence[dict]) -> np.ndarray | None:
    """Returns how often each image occurs per epoch by DATALOADER.SAMPLER_TRAIN; None for once."""
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return None
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return factors.double().numpy()
    raise UsageError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}, it must be one of {', '.join(TRAIN_SAMPLERS)}"
    )


def build_order(cfg: CfgNode, dicts: Sequence[dict], seed: int) -> ImageOrder:
    """Builds the order in which a run sees its training images.

    Args:
        cfg: DATALOADER is read.
        dicts: Detectron2's data set dicts.
        seed: seed of the run.

    Raises:
        UserError: for an unknown sampler, or if records lack what the sampler or grouping needs.
    """
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    try:
        landscape = _is_landscape(dicts) if grouped else None
        repeats = _repeat_factors(cfg, dicts)
    except KeyError as error:
        raise UsageError(
            f"the records of DATASETS.TRAIN have no {error.args[0]} (those of labelled images have "
            "none): set DATALOADER.ASPECT_RATIO_GROUPING False, SAMPLER_TRAIN TrainingSampler"
        ) from error
    return ImageOrder(len(dicts), seed, cfg.DATALOADER.GROUP_SIZE, landscape, repeats)


def _tell_of_groups(size: int, group_size: int) -> None:
    """Logs if batches of ``size`` images are not one group each."""
    if group_size == 1 or size == group_size or not comm.is_main_process():
        return
    if size % group_size:
        what = "groups of images of one orientation are split"
    else:
        what = "a batch may have landscape and portrait images, which are padded to a common size"
    logger.info(
        f"DATALOADER.GROUP_SIZE is {group_size}, but a process has {plural(size, 'image')} in a "
        f"pass: {what}"
    )


def _worker_failed(kind: type[BaseException], error: BaseException, trace: TracebackType) -> None:
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def init_worker(number: int) -> None:
    """Keeps a worker from printing an error if training ends while it fetches a batch.

    It also enables garbage collection, which may be disabled in the process that forked it.

    Args:
        number: index of the worker, which a DataLoader passes to its ``worker_init_fn``.
    """
    sys.excepthook = _worker_failed
    gc.enable()


@contextlib.contextmanager
def waiting_for_batch(cfg: CfgNode) -> Iterator[None]:
    """Applies a timeout to the main thread's wait for a batch, and reports failed workers.

    It also encloses the start of the workers, which continue when a signal reaches all processes.

    PyTorch's own timeout does not cover the transfer of a tensor from a stopped worker.

    Args:
        cfg: DATALOADER and MODEL.DEVICE are read.

    Raises:
        UserError: after DATALOADER.TIMEOUT seconds, if there are workers.
        RuntimeError: if a worker has exited; PyTorch's error, or one with a similar message.
    """
    seconds = cfg.DATALOADER.TIMEOUT if cfg.DATALOADER.NUM_WORKERS else 0

    def give_up(*_) -> NoReturn:
        raise UserError(
            f"the data loader's workers delivered no batch for {seconds} s (DATALOADER.TIMEOUT): "
            "they are stuck, or the storage does not respond"
        )

    start, left, interval = time.monotonic(), 0.0, 0.0
    if seconds:
        before = signal.signal(signal.SIGALRM, give_up)
        left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with outliving_signals():
            yield
    except UserError:
        if pins_memory(cfg):
            # PyTorch waits for the pinning thread, which may wait for a stopped worker.
            end_children()
        raise
    except (ConnectionError, EOFError, RuntimeError) as error:
        pinning = "Pin memory thread" in str(error)  # the thread receives tensors for a GPU
        if isinstance(error, RuntimeError) and not pinning:
            raise
        # A worker was killed while it sent a tensor. PyTorch's signal handler raises an error with
        # the cause as soon as it is notified.
        time.sleep(1)
        if pinning:
            raise
        raise RuntimeError("DataLoader worker exited unexpectedly") from error
    finally:
        if seconds:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        if left:  # of a timer that was set before
            left -= time.monotonic() - start
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001), interval)


def build_collator(cfg: CfgNode) -> Callable[[list[dict]], Sequence[dict]]:
    """Returns the function that collates inputs in a worker; one image tensor for a classifier."""
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        return collate_images
    return trivial_batch_collator


def pins_memory(cfg: CfgNode) -> bool:
    """Whether batches are pinned, so that a GPU copies them while the main thread continues."""
    return torch.device(cfg.MODEL.DEVICE).type == "cuda"


def to_device(batch: Sequence[dict], device: str) -> Sequence[dict]:
    """Moves a batch's images and label maps to a device, without waiting for the copies.

    Instances are left to Detectron2's models, because their boxes cannot be copied asynchronously.

    Args:
        batch: batch of the loader. An :class:`ImageBatch` is returned as is; the model copies it.
        device: MODEL.DEVICE.
    """
    if isinstance(batch, ImageBatch):
        return batch

    def move(value: object) -> object:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    return [{name: move(value) for name, value in each.items()} for each in batch]


def build_train_loader(cfg: CfgNode, dicts: Sequence[dict], seed: int) -> DataLoader:
    """Builds the loader of this rank's training batches; its ``batch_sampler`` can be resumed.

    Args:
        cfg: MODEL.META_ARCHITECTURE, MODEL.DEVICE, SOLVER.IMS_PER_BATCH, SOLVER.GRAD_ACCUM_STEPS,
            DATALOADER and INPUT are read.
        dicts: Detectron2's data set dicts.
        seed: seed of order and augmentation, the same on all ranks.

    Raises:
        UserError: if the batch does not divide over processes and passes, or for an unknown
            sampler.
    """
    rank, world_size = comm.get_rank(), comm.get_world_size()
    size = micro_batch_size(cfg, world_size)
    order = build_order(cfg, dicts, seed)
    _tell_of_groups(size, order.group_size)
    solver = cfg.SOLVER
    sampler = TrainingBatchSampler(
        order, solver.IMS_PER_BATCH, solver.GRAD_ACCUM_STEPS, rank, world_size
    )
    return DataLoader(
        SeededDataset(dicts, build_train_mapper(cfg)),
        batch_sampler=sampler,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=build_collator(cfg),
        pin_memory=pins_memory(cfg),
        worker_init_fn=init_worker,
        # Its own generator, because starting workers must not change the training's random state.
        generator=torch.Generator(),
    )
