"""Saves and loads checkpoints; a file or model is never left half written or half loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor
from torch.optim import Optimizer

from contnet.checkpoint.background_writer import BackgroundWriter, HostCopy
from contnet.checkpoint.loading import load_weights
from contnet.checkpoint.metadata import METADATA, Metadata
from contnet.checkpoint.names import (
    BEST,
    LAST_CHECKPOINT,
    checkpoint_files,
    find_checkpoint,
    iteration_of,
)
from contnet.checkpoint.reading import EMA_KEYS, Weights, read_weights
from contnet.checkpoint.verification import verify_file
from contnet.utils.errors import UserError
from contnet.utils.files import NO_GUARD, TEMPORARY_SUFFIX, WriteGuard, atomic_write

__all__ = ["Checkpointer"]

_TEMPORARY = "temporary"  # key that marks a checkpoint to delete after the next one is saved


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but atomic and strict.

    A file gets its name once it is complete and verified; ``last_checkpoint`` is updated after
    that.

    Args:
        model: the model, or a DistributedDataParallel of it.
        save_dir: folder in which checkpoints are saved and looked for.
        allow_missing: whether :meth:`load_backbone` accepts a file without some of its tensors.
        keep: number of latest numbered checkpoints that are kept; model_final.pth and
            model_best.pth are always kept.
        background: whether :meth:`save` returns once the state is copied, and a thread writes it.
            This needs host memory of the size of a checkpoint (for a GPU up to twice that, since
            page-locked memory is rounded up). Call :meth:`wait` at the end of the training.
        model_optimizer: with ``background``, the optimiser whose parameters and state change only
            in its step: the thread copies these, too, and the next step waits for the copy.
        metadata: metadata of the model, which are saved in checkpoints and compared with files;
            None to save and compare nothing.
        guard: called before anything is written or removed.
        **checkpointables: objects with a state dict that are saved and resumed with the model.

    Attributes:
        earlier: numbered checkpoints from before a resume, in the order of images seen. Their
            numbers may exceed those of later ones, if a run is resumed with a larger batch.
        warnings: warnings about the last file that concern results, a line each.
        file_classes: names of the last file's classes, in order; None if they are unknown.
    """

    def __init__(
        self,
        model,
        save_dir: str = "",
        *,
        allow_missing: bool = False,
        keep: int = 3,
        background: bool = False,
        model_optimizer: Optimizer | None = None,
        metadata: Metadata | None = None,
        guard: WriteGuard = NO_GUARD,
        **checkpointables,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.allow_missing = allow_missing
        self.keep = keep
        self.background = background
        self._writer = BackgroundWriter()
        self._host_copy = HostCopy()
        self._temporary: Path | None = None
        self._copied_iteration = None  # iteration of the host copy
        self._copying: Future | None = None
        self._optimizer = model_optimizer
        if background and model_optimizer is not None:
            model_optimizer.register_step_pre_hook(self._await_copy)
        self.metadata = metadata
        self.guard = guard
        self.earlier: list[Path] = []
        self.warnings: list[str] = []
        self.file_classes: list[str] | None = None

    def save(
        self, name: str, *, iteration: int | None = None, temporary: bool = False, **kwargs
    ) -> None:
        """Saves model and checkpointables to ``<name>.pth``, then deletes the oldest checkpoints.

        In the background, files are written in the order of the calls. A call with another
        iteration waits until all earlier files are written.

        Args:
            name: name of the file; a resume uses the last one, except ``BEST``.
            iteration: calls with the same iteration, and without kwargs, save the same state, which
                is copied only once.
            temporary: whether to delete the file after the next save of a later state; ``keep``
                does not count it. The file is marked as temporary.
            **kwargs: more data to save.

        Raises:
            UserError: if this file, or an earlier one in the background, cannot be written; the
                last checkpoint is not changed.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path = Path(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        if temporary:
            kwargs[_TEMPORARY] = True
        if not self.background:
            self._write(path, partial(self._state, **kwargs), temporary)
            return
        if kwargs or iteration is None or iteration != self._copied_iteration:
            self.wait()
            self._copied_iteration = None
            self._host_copy.take(self._state(**kwargs), self._deferred_tensors())
            self._copying = self._writer.submit(self._host_copy.finish)
            self._copied_iteration = None if kwargs else iteration
        self.check()
        self._writer.submit(self._write, path, self._host_copy.read, temporary)

    def _deferred_tensors(self) -> Iterator[Tensor]:
        """Yields the tensors that can be copied any time before the optimiser's next step."""
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                yield from group["params"]
            for state in self._optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    def _await_copy(self, *_) -> None:
        if self._copying is not None:
            self._copying.result()
            self._copying = None

    def check(self) -> None:
        """Raises UserError if a file could not be written in the background; does not wait."""
        self._writer.check()

    def wait(self) -> None:
        """Waits until all files are written.

        Raises:
            UserError: if a file could not be written.
        """
        self._writer.wait()

    def _state(self, **kwargs) -> dict:
        data = {"model": self.model.state_dict()}
        if self.metadata is not None:
            data[METADATA] = self.metadata.state()
        data.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        data.update(kwargs)
        return data

    def _write(self, path: Path, read: Callable[[], object], temporary: bool) -> None:
        try:
            if path.stem == BEST:
                self._write_verified(path, read)
            else:
                # Opened first, so that a killed first save leaves a temporary file of this name.
                pointer = Path(self.save_dir, LAST_CHECKPOINT)
                with atomic_write(pointer, "w", self.guard) as file:
                    file.write(path.name)
                    self._write_verified(path, read)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"checkpoint {path} cannot be written: {reason}") from error
        if path.stem != BEST:
            self._replace_temporary(path if temporary else None, by=path)
        if iteration_of(path.stem) is not None:
            self._drop_old(path)

    def _write_verified(self, path: Path, read: Callable[[], object]) -> None:
        with atomic_write(path, guard=self.guard) as file:
            torch.save(read(), file)
            file.flush()
            with open(file.name, "rb") as written:
                try:
                    verify_file(written, path.name)
                except UserError as error:
                    reason = f"the file differs from what was written: {error}"
                    raise UserError(f"checkpoint {path} cannot be written: {reason}") from error

    def _replace_temporary(self, new: Path | None, by: Path) -> None:
        if self._temporary not in (None, by):
            self.guard.check()
            self._temporary.unlink(missing_ok=True)
        self._temporary = new

    def _drop_old(self, saved: Path) -> None:
        self.earlier = [path for path in self.earlier if path != saved]
        places = {path: i for i, path in enumerate(self.earlier)}
        numbers = {path: iteration_of(path.stem) for path in checkpoint_files(self.save_dir)}
        files = sorted(
            (path == saved, places.get(path, len(places)), number, path)
            for path, number in numbers.items()
            if number is not None and path != self._temporary
        )
        for *_, path in files[: max(len(files) - self.keep, 0)]:
            self.guard.check()
            path.unlink(missing_ok=True)

    def has_checkpoint(self) -> bool:
        self.wait()
        return super().has_checkpoint()

    def get_checkpoint_file(self) -> str:
        self.wait()
        path = find_checkpoint(self.save_dir)
        return "" if path is None else str(path)

    def _read(self, path: str, ema: bool = False) -> Weights:
        self.wait()
        self.logger.info(f"Loading weights of {path}")
        weights = read_weights(path, prefer_ema=ema)
        self.warnings = weights.warnings
        self.file_classes = weights.classes
        if weights.is_ema and not ema:
            self.logger.warning(f"{path} has only EMA weights ({weights.key!r}), which are used")
        return weights

    def load_backbone(self, path: str) -> None:
        """Loads initial weights, which must contain every tensor of the backbone.

        Args:
            path: a file or URL in any format that docs/weights.md lists. Of our own runs, the rest
                of the model is loaded, too, if it fits. The last weights are used, or the EMA if
                there are no others.

        Raises:
            UserError: if the file cannot be read, lacks tensors of the backbone, or is of a network
                that computes something else.
        """
        weights = self._read(path)
        options = {"ours": self.metadata, "allow_missing": self.allow_missing}
        load_weights(self.model, weights, whole=False, **options)
        if ema := [key for key in EMA_KEYS if key in weights.rest]:
            self.logger.warning(
                f"{path} also has EMA weights ({ema[0]!r}), which are not used: to use them, "
                "convert the file with tools/convert_weights.py"
            )

    def load(
        self,
        path: str,
        checkpointables: Sequence[str] | None = None,
        *,
        ema: bool = False,
        subset: bool = False,
    ) -> dict:
        """Loads a checkpoint, which must contain every tensor of the model.

        Args:
            path: a file or URL.
            checkpointables: names of the checkpointables to load; None for all.
            ema: whether to load the EMA of the weights.
            subset: whether to accept a file with more classes than the data; the caller maps them.

        Returns:
            The other contents of the checkpoint.

        Raises:
            UserError: if the file cannot be read, has no EMA although ``ema`` is set, has another
                architecture, or was trained on other classes.
        """
        weights = self._read(path, ema)
        if ema and not weights.is_ema:
            raise UserError(f"{path} has no EMA weights: set SOLVER.EMA.ENABLED False")
        load_weights(self.model, weights, whole=True, ours=self.metadata, subset=subset)
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in weights.rest:
                self.checkpointables[key].load_state_dict(weights.rest[key])
        if weights.rest.get(_TEMPORARY) and Path(path).parent == Path(self.save_dir):
            self._temporary = Path(path)
        return weights.rest

    def remove_leftovers(self) -> None:
        """Deletes incomplete files of a killed training."""
        self.wait()
        self.guard.check()  # a later attempt may be writing its files
        for path in Path(self.save_dir).glob("*" + TEMPORARY_SUFFIX):
            # Without a writer's name, .json and .yaml files may be those of a running evaluation.
            if Path(path.stem).suffix not in (".json", ".yaml"):
                path.unlink(missing_ok=True)
