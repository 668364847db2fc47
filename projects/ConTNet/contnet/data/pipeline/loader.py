"""The loader of training batches: an endless, resumable sequence.

Detectron2's sampler gives the order and its aspect-ratio grouping makes the batches, but of small
records, in the main process; workers then load whole batches. So the order depends neither on the
number of workers nor on their timing, and a run is resumed by replaying records, not images.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from contnet.data.pipeline.mappers import NamedErrors, build_train_mapper
from contnet.data.pipeline.records import Records
from contnet.utils.errors import UserError
from contnet.utils.seed import seed_everything

__all__ = ["TRAIN_SAMPLERS", "TrainingBatchSampler", "build_train_loader", "micro_batch_size"]

TRAIN_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")

logger = logging.getLogger(__name__)


class SeededDataset(Dataset):
    """Loads (position, index) pairs, each under a random state of its own.

    Args:
        dicts: Detectron2's data set dicts; a list is serialised, records are so already.
        mapper: makes a model input from one.
        batch_sampler: gives the seed; positions are its.
    """

    def __init__(
        self,
        dicts: Sequence[dict],
        mapper: Callable[[dict], dict],
        batch_sampler: TrainingBatchSampler,
    ):
        self.dicts = dicts if isinstance(dicts, Records) else DatasetFromList(dicts, copy=False)
        self.mapper = NamedErrors(mapper)
        self.batch_sampler = batch_sampler

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        position, index = item
        seed_everything(self.batch_sampler.seed, position)
        return self.mapper(self.dicts[index])


class TrainingBatchSampler(Sampler):
    """Batches of (position, index) for this rank, without end.

    Args:
        shapes: (width, height) of every image, in pixels; without ``group`` only their number
            counts.
        batch_size: images per batch, of this rank.
        seed: of order and augmentation, the same on all ranks.
        make_sampler: makes the sampler of indices from ``seed=``; spawned workers pickle it.
        group: put only landscape or only portrait images into a batch.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        batch_size: int,
        seed: int,
        make_sampler: Callable[..., Sampler],
        group: bool,
    ):
        self.shapes = shapes
        self.batch_size = batch_size
        self.seed = seed
        self.make_sampler = make_sampler
        self.group = group
        self.start = 0  # images of all ranks before the first one here
        self.batches = 0  # batches of this rank to leave out after that

    def _records(self) -> Iterator[dict]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        first = -(-self.start // world_size)
        indices = self.make_sampler(seed=self.seed)
        for i, index in itertools.islice(enumerate(indices), first, None):
            width, height = self.shapes[index]
            yield {"item": (i * world_size + rank, index), "width": width, "height": height}

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        records = self._records()
        if self.group:
            batches = iter(AspectRatioGroupedDataset(records, self.batch_size))
        else:
            batches = iter(lambda: list(itertools.islice(records, self.batch_size)), [])
        for batch in itertools.islice(batches, self.batches, None):
            yield [record["item"] for record in batch]

    def images_before(self, batches: int) -> int:
        """Images that all ranks together have used after ``batches`` batches of each."""
        return self.start + batches * self.batch_size * comm.get_world_size()

    def state_dict(self, batches: int) -> dict:
        """What a later run needs in order to go on after ``batches`` batches of each rank."""
        return {
            "seed": self.seed,
            "images": len(self.shapes),
            "batch_size": self.batch_size,
            "world_size": comm.get_world_size(),
            "start": self.start,
            "batches": batches,
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on where another run stopped; with other processes or batches, about there."""
        self.seed = state["seed"]
        here = self.state_dict(0)
        changed = [key for key in ("images", "batch_size", "world_size") if here[key] != state[key]]
        if not changed:
            self.start, self.batches = state["start"], state["batches"]
            return
        self.start = state["start"] + state["batches"] * state["batch_size"] * state["world_size"]
        self.batches = 0
        reasons = ", ".join(f"{key} {state[key]} -> {here[key]}" for key in changed)
        logger.warning(
            f"Resuming after {self.start} images, but their order is no longer that of the run "
            f"that was cut ({reasons})"
        )


def micro_batch_size(cfg: CfgNode, processes: int) -> int:
    """Images that each process sees in one forward pass.

    Raises:
        UserError: if SOLVER.IMS_PER_BATCH does not divide over processes and passes.
    """
    parts = processes * cfg.SOLVER.GRAD_ACCUM_STEPS
    size, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, parts)
    if rest or size == 0:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} does not divide over {processes} "
            f"processes x SOLVER.GRAD_ACCUM_STEPS {cfg.SOLVER.GRAD_ACCUM_STEPS}: choose a multiple "
            f"of {parts}"
        )
    return size


class _Shapes(Sequence):
    """(width, height) of every image; (0, 0) unless ``known``. Of records, nothing is copied."""

    def __init__(self, dicts: Sequence[dict], known: bool):
        self._sizes = None
        self._length = len(dicts)
        if known and isinstance(dicts, Records):
            self._sizes = dicts.size
        elif known:
            self._sizes = [(d["width"], d["height"]) for d in dicts].__getitem__

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[float, float]:
        return (0, 0) if self._sizes is None else self._sizes(index)


def _sampler_maker(cfg: CfgNode, dicts: Sequence[dict]) -> Callable[..., Sampler]:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return partial(TrainingSampler, len(dicts))
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return partial(RepeatFactorTrainingSampler, factors)
    raise UserError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}, it must be one of {', '.join(TRAIN_SAMPLERS)}"
    )


def build_train_loader(cfg: CfgNode, dicts: Sequence[dict], seed: int) -> DataLoader:
    """The loader of this rank's training batches; its ``batch_sampler`` can be resumed.

    Args:
        cfg: SOLVER.IMS_PER_BATCH, SOLVER.GRAD_ACCUM_STEPS, DATALOADER and INPUT are read.
        dicts: Detectron2's data set dicts.
        seed: of order and augmentation, the same on all ranks.

    Raises:
        UserError: if the batch does not divide over the processes, or for an unknown sampler.
    """
    batch_size = micro_batch_size(cfg, comm.get_world_size())
    group = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    make_sampler = _sampler_maker(cfg, dicts)
    sampler = TrainingBatchSampler(_Shapes(dicts, group), batch_size, seed, make_sampler, group)
    return DataLoader(
        SeededDataset(dicts, build_train_mapper(cfg), sampler),
        batch_sampler=sampler,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        # Its own generator: starting workers must not draw from the training's random state.
        generator=torch.Generator(),
    )
