"""Writes checkpoints in the background, while the training continues.

A :class:`HostCopy` copies the state into buffers that are reused by later saves, and a
:class:`BackgroundWriter` writes files in a thread.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, UntypedStorage

__all__ = ["BackgroundWriter", "HostCopy"]


def _is_plain(tensor: Tensor) -> bool:
    """Whether storage, offset, shape and strides describe a tensor completely."""
    odd = tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    return type(tensor) is Tensor and tensor.layout is torch.strided and not odd


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class _Pickler(pickle.Pickler):
    """Passes tensors to ``keep``, and pickles the number that it returns for each."""

    def __init__(self, file: io.BytesIO, keep: Callable[[Tensor], int]):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.keep = keep

    def persistent_id(self, value: object) -> int | None:
        return self.keep(value) if isinstance(value, Tensor) and _is_plain(value) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


class HostCopy:
    """A deep copy, in host memory, of nested Python objects with tensors.

    Whole storages are copied, so tensors that share a storage still do. GPU storages are copied to
    page-locked memory on the current stream: this process does not wait for the copy, and a later
    step cannot overtake it. Another thread can copy storages that are in host memory.
    """

    def __init__(self):
        self._buffers: list[tuple[str, UntypedStorage]] = []  # device type of the source, copy
        self._forget()

    def _forget(self) -> None:
        self._pickled = b""
        self._tensors: list[Tensor] = []
        self._numbers: dict[int, tuple[int, Tensor]] = {}  # by id of the tensor
        self._storages: dict[int, UntypedStorage] = {}  # copies by id of the source
        self._deferred: set[int] = set()  # ids of the sources
        self._rest: list[tuple[UntypedStorage, UntypedStorage]] = []  # source, copy
        self._copied: torch.cuda.Event | None = None

    def take(self, data: object, deferred: Iterable[Tensor] = ()) -> None:
        """Copies ``data`` and replaces the previous copy; buffers of the same size are reused.

        Args:
            data: an object that pickle supports. Pickle copies tensors that are not dense.
            deferred: tensors in ``data`` that do not change until :meth:`finish` has copied them.
        """
        self._forget()
        self._deferred = {t.untyped_storage()._cdata for t in deferred if t.device.type == "cpu"}
        file = io.BytesIO()
        _Pickler(file, self._keep).dump(data)
        self._pickled = file.getvalue()
        del self._buffers[len(self._storages) :]
        if any(device == "cuda" for device, _ in self._buffers):
            self._copied = torch.cuda.Event()
            self._copied.record()
        # Ids are no longer valid once the state may change.
        self._numbers, self._storages, self._deferred = {}, {}, set()

    def finish(self) -> None:
        """Copies the deferred tensors of :meth:`take`; may be called by another thread."""
        for source, copy in self._rest:
            _bytes(copy).copy_(_bytes(source))
        self._rest = []

    def read(self) -> object:
        """Returns the copied data; waits until a GPU has copied its tensors."""
        if self._copied is not None:
            self._copied.synchronize()
        return _Unpickler(io.BytesIO(self._pickled), self._tensors).load()

    def _keep(self, tensor: Tensor) -> int:
        number, _ = self._numbers.setdefault(id(tensor), (len(self._tensors), tensor))
        if number == len(self._tensors):
            place = (tensor.storage_offset(), tensor.size(), tensor.stride())
            copy = torch.empty(0, dtype=tensor.dtype)
            self._tensors.append(copy.set_(self._copy(tensor.untyped_storage()), *place))
        return number

    def _copy(self, source: UntypedStorage) -> UntypedStorage:
        # torch.save identifies storages by the same number.
        if source._cdata not in self._storages:
            device = source.device.type
            copy = self._buffer(len(self._storages), device, source.nbytes())
            if source._cdata in self._deferred:
                self._rest.append((source, copy))
            else:
                _bytes(copy).copy_(_bytes(source), non_blocking=device == "cuda")
            self._storages[source._cdata] = copy
        return self._storages[source._cdata]

    def _buffer(self, number: int, device: str, size: int) -> UntypedStorage:
        kept = self._buffers[number : number + 1]
        if not kept or kept[0][0] != device or kept[0][1].nbytes() != size:
            new = torch.empty(size, dtype=torch.uint8, pin_memory=device == "cuda")
            self._buffers[number : number + 1] = [(device, new.untyped_storage())]
        return self._buffers[number][1]


class BackgroundWriter:
    """Runs functions in a thread, one after the other, until one fails.

    The interpreter does not exit before the thread ends.
    """

    def __init__(self):
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="contnet-checkpoint")
        self._tasks: list[Future] = []

    def submit(self, function: Callable, *args: object) -> Future:
        """Calls ``function(*args)`` in the thread, after all earlier submissions."""
        before = self._tasks[-1] if self._tasks else None
        self._tasks.append(self._executor.submit(self._run, before, function, *args))
        return self._tasks[-1]

    @staticmethod
    def _run(before: Future | None, function: Callable, *args: object) -> None:
        if before is not None:
            before.result()
        function(*args)

    def check(self) -> None:
        """Raises the error of a function that has failed, once; does not wait."""
        done = [task for task in self._tasks if task.done()]  # queried once: others may end now
        if any(task.exception() for task in done):
            self.wait()
        self._tasks = [task for task in self._tasks if task not in done]

    def wait(self) -> None:
        """Waits for all functions; raises the error of one that has failed, once."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.result()
