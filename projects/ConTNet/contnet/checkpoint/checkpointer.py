"""Checkpoints that are never half written, and weights that never half load."""

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

_TEMPORARY = "temporary"  # key of a checkpoint that goes when the next one is there


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, made atomic and strict.

    A file takes its name once it is complete and verified, and ``last_checkpoint`` names it after
    that.

    Args:
        model: the model, or a DistributedDataParallel of it.
        save_dir: where checkpoints are saved and looked for.
        allow_missing: let :meth:`load_backbone` accept a file without some of its tensors.
        keep: the numbered checkpoints that stay, those of the latest iterations; model_final.pth
            and model_best.pth always do.
        background: return from :meth:`save` once the state is copied, and write it in a thread.
            Takes host memory of the size of a checkpoint (for a GPU up to twice, for page-locked
            memory is rounded up). Whoever ends the training calls :meth:`wait`.
        model_optimizer: in the background, the optimiser in whose step alone its parameters and
            its state change: the thread copies these, too, and the next step waits until it has.
        metadata: facts of the model, which checkpoints carry and files are compared with; None to
            save and compare nothing.
        guard: is asked before anything is written or removed.
        **checkpointables: objects with a state dict that are saved and resumed with the model.

    Attributes:
        earlier: numbered checkpoints of before a resume, in the order of what they have seen. Their
            numbers may be above later ones, where a run goes on with a larger batch.
        warnings: what was said of the last file that changes results, a line each.
        file_classes: names of the last file's classes, in order; None where nothing tells them.
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
        self._copied_iteration = None  # of the host copy
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
        """Saves model and checkpointables to ``<name>.pth``, then drops the earliest ones.

        In the background, files are written in the order of the calls, and one of another iteration
        waits for all before.

        Args:
            name: ``BEST`` is not what a resume goes on from; any other is.
            iteration: calls with the same one, and without kwargs, save the same state, which need
                be copied only once.
            temporary: the file goes once another one of a later state is there, and ``keep`` does
                not count it. The file says so of itself.
            **kwargs: more to save.

        Raises:
            UserError: if this file, or an earlier one in the background, cannot be written; the
                last checkpoint stays what it was.
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
        """What may be copied until the optimiser's next step."""
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
        """Returns when no file is being written any more.

        Raises:
            UserError: if one could not be written.
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
                # Begun first: of a first save that was cut off before its end, it stays behind.
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
        """Starts from weights that must give every tensor of the backbone.

        Args:
            path: a file or URL of any form that docs/weights.md lists. Of a run of ours the rest of
                the model is taken, too, where it fits. The last weights count, an EMA only where
                there are no others.

        Raises:
            UserError: if the file cannot be read, gives not all of the backbone's tensors, or says
                that they are of a network of another function.
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
        """Loads a checkpoint that must give every tensor of the model.

        Args:
            path: a file or URL.
            checkpointables: names of those to load, too; None for all.
            ema: load the EMA of the weights.
            subset: the file may have more classes than the data, which a caller then maps.

        Returns:
            All that the checkpoint holds beside the weights.

        Raises:
            UserError: if the file cannot be read, has no EMA that was asked for, is one of another
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
        """Deletes what a killed training left half written."""
        self.wait()
        self.guard.check()  # those of a later attempt are still being written
        for path in Path(self.save_dir).glob("*" + TEMPORARY_SUFFIX):
            # Without a writer's name, files other than checkpoints are of an evaluation that runs.
            if Path(path.stem).suffix not in (".json", ".yaml"):
                path.unlink(missing_ok=True)
