"""Checkpoints that are never half written, and weights that never half load."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor
from torch.optim import Optimizer

from contnet.checkpoint.background_writer import BackgroundWriter, HostCopy
from contnet.checkpoint.loading import (
    check_class_names,
    check_pre_norm,
    check_tensors,
    conversion_advice,
    translate_names,
)
from contnet.checkpoint.names import BEST, LAST_CHECKPOINT, iteration_of
from contnet.checkpoint.reading import (
    EMA_KEYS,
    METADATA,
    MODEL_KEYS,
    pick_weights,
    read_plain_pickle,
    read_safetensors,
    read_torch,
    trained_class_names,
)
from contnet.modeling.backbone import backbone_prefix
from contnet.modeling.classifier import ImageClassifier
from contnet.utils.errors import UserError
from contnet.utils.files import NO_GUARD, TEMPORARY_SUFFIX, WriteGuard, atomic_write
from contnet.utils.text import first_names

__all__ = ["Checkpointer"]


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, made atomic and strict.

    A file takes its name once it is complete, and ``last_checkpoint`` names it after that.

    Args:
        model: the model, or a DistributedDataParallel of it.
        save_dir: where checkpoints are saved and looked for.
        allow_missing: let :meth:`load_backbone` accept a file without some of its tensors.
        keep: the most recent numbered checkpoints that stay; model_final.pth and model_best.pth
            always do.
        background: return from :meth:`save` once the state is copied, and write it in a thread.
            Takes host memory of the size of a checkpoint (for a GPU up to twice, for page-locked
            memory is rounded up). Whoever ends the training calls :meth:`wait`.
        model_optimizer: in the background, the optimiser in whose step alone its parameters and
            its state change: the thread copies these, too, and the next step waits until it has.
        classes: names of the data's classes, in order; None where nothing tells them. A whole
            checkpoint that was trained on others is refused.
        guard: is asked before anything is written or removed.
        **checkpointables: objects with a state dict that are saved and resumed with the model.
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
        classes: Sequence[str] | None = None,
        guard: WriteGuard = NO_GUARD,
        **checkpointables,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.allow_missing = allow_missing
        self.keep = keep
        self.background = background
        self._writer = BackgroundWriter()
        self._host_copy = HostCopy()
        self._copied_iteration = None  # of the host copy
        self._copying: Future | None = None
        self._optimizer = model_optimizer
        if background and model_optimizer is not None:
            model_optimizer.register_step_pre_hook(self._await_copy)
        self.classes = classes
        self.guard = guard
        self._strict_prefix = ""
        self._file = ""

    def save(self, name: str, *, iteration: int | None = None, **kwargs) -> None:
        """Saves model and checkpointables to ``<name>.pth``, then drops the oldest ones.

        In the background, files are written in the order of the calls, and one of another iteration
        waits for all before.

        Args:
            name: ``BEST`` is not what a resume goes on from; any other is.
            iteration: calls with the same one, and without kwargs, save the same state, which need
                be copied only once.
            **kwargs: more to save.

        Raises:
            UserError: if this file, or an earlier one in the background, cannot be written; the
                last checkpoint stays what it was.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path = Path(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        if not self.background:
            self._write(path, partial(self._state, **kwargs))
            return
        if kwargs or iteration is None or iteration != self._copied_iteration:
            self.wait()
            self._copied_iteration = None
            self._host_copy.take(self._state(**kwargs), self._deferred_tensors())
            self._copying = self._writer.submit(self._host_copy.finish)
            self._copied_iteration = None if kwargs else iteration
        self.check()
        self._writer.submit(self._write, path, self._host_copy.read)

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
        data.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        data.update(kwargs)
        return data

    def _write(self, path: Path, read: Callable[[], object]) -> None:
        try:
            with atomic_write(path, guard=self.guard) as file:
                torch.save(read(), file)
            if path.stem != BEST:
                self.tag_last_checkpoint(path.name)
        except (OSError, RuntimeError) as error:
            # torch.save reports a full disk as a RuntimeError of its zip writer.
            raise UserError(f"checkpoint {path} cannot be written: {error}") from error
        self._drop_old()

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(Path(self.save_dir, LAST_CHECKPOINT), "w", self.guard) as file:
            file.write(last_filename_basename)

    def _drop_old(self) -> None:
        files = Path(self.save_dir).glob("*.pth")
        numbered = sorted(path for path in files if iteration_of(path.stem) is not None)
        for path in numbered[: max(len(numbered) - self.keep, 0)]:
            path.unlink()

    def has_checkpoint(self) -> bool:
        self.wait()
        return super().has_checkpoint()

    def get_checkpoint_file(self) -> str:
        self.wait()
        path = super().get_checkpoint_file()
        if path and not os.path.isfile(path):
            raise UserError(
                f"{Path(self.save_dir, LAST_CHECKPOINT)} names {Path(path).name}, which is not "
                "there: write the name of a checkpoint of this folder into it"
            )
        return path

    def load_backbone(self, path: str) -> None:
        """Starts from weights that must give every tensor of the backbone.

        Args:
            path: a detector of ours, a classifier of ours or of the ConTNet authors, a ResNet of
                torchvision or timm, or a Detectron2 model-zoo backbone (.pkl). A classifier also
                gets its head from it, if that has as many classes. The last weights count, an
                EMA only where there are no others.

        Raises:
            UserError: if the file cannot be read, or gives not all of the backbone's tensors.
        """
        self._strict_prefix = backbone_prefix(self.model)
        rest = self.load(path, checkpointables=[])
        if ema := [key for key in EMA_KEYS if key in rest]:
            self.logger.warning(
                f"{path} also has EMA weights ({ema[0]!r}), which are not used: for them "
                "give the file that tools/convert_weights.py makes of it"
            )

    def load_checkpoint(self, path: str, resume: bool = False) -> dict:
        """Loads a checkpoint that must give every tensor of the model.

        Args:
            path: the file.
            resume: also load the checkpointables.

        Returns:
            What else the checkpoint holds.

        Raises:
            UserError: if the file cannot be read, is one of another architecture, or was trained
                on other classes.
        """
        self._strict_prefix = ""
        return self.load(path, checkpointables=None if resume else [])

    def _torch_load(self, f: str) -> dict:
        content = read_safetensors(f) if f.endswith(".safetensors") else read_torch(f)
        state, key, _ = pick_weights(content, (*MODEL_KEYS, *EMA_KEYS))
        if not key:
            return content
        if key in EMA_KEYS:
            self.logger.warning(f"{f} has EMA weights alone ({key!r}), which are used")
        return {**{name: value for name, value in content.items() if name != key}, "model": state}

    def _load_file(self, filename: str) -> dict:
        if filename.endswith(".pkl"):
            read_plain_pickle(filename)
        loaded = super()._load_file(filename)
        state = loaded["model"]
        pairs = isinstance(state, Mapping) and state.items()
        if not pairs or not all(
            isinstance(name, str) and isinstance(value, (Tensor, np.ndarray))
            for name, value in pairs
        ):
            raise UserError(
                f"{filename} holds no weights: it must be tensors by name alone, or have them as "
                f"{' or '.join(map(repr, MODEL_KEYS))}; {conversion_advice(filename)}"
            )
        self._file = filename
        check_pre_norm(self.model, loaded.get(METADATA), filename)
        if not loaded.get("matching_heuristics"):
            loaded["model"] = translate_names(self.model, state, filename)
        check_tensors(self.model, loaded["model"], self._strict_prefix, filename)
        # Of another architecture the classes are the lesser trouble.
        if not self._strict_prefix and self.model.state_dict().keys() & loaded["model"].keys():
            check_class_names(self.model, self.classes, trained_class_names(loaded), filename)
        return loaded

    def _load_model(self, checkpoint: dict):
        given = [name.removeprefix("module.") for name in checkpoint["model"]]
        # Detectron2 fills in a FrozenBN's absent statistics and counts them as loaded, which is
        # right for its own model zoo alone.
        exact = not checkpoint.get("matching_heuristics")
        incompatible = super()._load_model(checkpoint)
        wanted = [
            name
            for name in self.model.state_dict()
            if name.startswith(self._strict_prefix) and not name.endswith("num_batches_tracked")
        ]
        unfit = {*incompatible.missing_keys, *(each[0] for each in incompatible.incorrect_shapes)}
        if self._strict_prefix and isinstance(self.model, ImageClassifier):
            head = self.model.head_names()
            wanted = [name for name in wanted if name not in head]
            if new := [name for name in head if name in unfit]:
                self.logger.info(
                    f"The classifier's head starts from random weights: {first_names(new)}"
                )
        misshapen = [name for name, _, _ in incompatible.incorrect_shapes if name in wanted]
        absent = set(incompatible.missing_keys) | (set(wanted) - set(given) if exact else set())
        absent = [name for name in wanted if name in absent and name not in misshapen]
        loaded = len(wanted) - len(misshapen) - len(absent)
        what = "backbone" if self._strict_prefix else "model"
        line = f"{loaded} of the {len(wanted)} tensors of the {what} came from the file"
        if misshapen or absent:
            line += f"; {len(absent)} are not in it" if absent else ""
            line += f" ({first_names(absent)})" if absent else ""
            line += (
                f"; {len(misshapen)} have another shape ({first_names(misshapen)})"
                if misshapen
                else ""
            )
            if not (self._strict_prefix and self.allow_missing):
                raise UserError(f"{line}; {self._advice(given, misshapen, absent)}")
        self.logger.info(line)
        return incompatible

    def _advice(self, given: list[str], misshapen: list[str], absent: list[str]) -> str:
        if self._strict_prefix:
            return (
                "give weights of this very backbone (variant and options), or allow it with "
                f"MODEL.ALLOW_MISSING_WEIGHTS True; {conversion_advice(self._file)}"
            )
        classifies = isinstance(self.model, ImageClassifier)
        if classifies and not absent and set(misshapen) <= set(self.model.head_names()):
            return "its head is for another number of classes than MODEL.CLASSIFIER.NUM_CLASSES"
        if not absent:
            return "it is a checkpoint of another architecture, or of another number of classes"
        return f"it is a checkpoint of another architecture, its first tensor is {given[0]!r}"

    def load(self, path: str, *args, **kwargs) -> dict:
        self.wait()
        try:
            return super().load(path, *args, **kwargs)
        finally:
            # Detectron2 leaves it set if loading fails, and then refuses to load again.
            self._parsed_url_during_load = None

    def remove_leftovers(self) -> None:
        """Deletes what a killed process left half written."""
        self.wait()
        self.guard.check()  # those of a later attempt are still being written
        for path in Path(self.save_dir).glob("*" + TEMPORARY_SUFFIX):
            path.unlink()
