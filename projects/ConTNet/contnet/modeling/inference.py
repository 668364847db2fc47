"""Optimises a network or a detector's backbone for inference: half precision, CUDA graphs, compile.

This is plain PyTorch. It works for any module that maps a batch of images to tensors.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["CudaGraphs", "OptimizedNetwork", "cast_weights", "optimize_for_inference"]

logger = logging.getLogger(__name__)

_WARM_UPS = 3  # number that PyTorch recommends before recording a CUDA graph


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts weights, but not norms with running statistics, which need more precision."""
    norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    own = [norm.state_dict() for norm in norms]
    model.to(dtype)
    for norm, state in zip(norms, own, strict=True):
        norm.float().load_state_dict(state)
    return model


class CudaGraphs:
    """Runs a network, and records a CUDA graph for each kind of images that occurs again.

    A kind is a combination of shape, type, device and autocast. All graphs share one memory pool,
    since they never run at the same time; each has its own images and outputs.

    Args:
        network: called with a batch of images.
        max_bytes: once the graphs use this much memory, other kinds run without graphs; 0 for no
            graphs.
    """

    def __init__(self, network: nn.Module, max_bytes: int):
        self.network = network
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self.replays: dict[tuple, Callable[[Tensor], object]] = {}
        self._seen: set[tuple] = set()
        self._told = False
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None

    def _key(self, images: Tensor) -> tuple:
        kind = images.device.type
        amp = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return images.shape, images.dtype, images.device, amp, self.network.training

    def record(self, images: Tensor) -> tuple[Callable[[Tensor], object], int]:
        """Records the network on these images.

        Returns:
            A function that replays it on images of the same kind, and the bytes that it uses.
        """
        kind = images.device.type
        # A graph must not read weights from autocast's cache of casts, which is temporary.
        amp = torch.autocast(
            kind,
            torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        with torch.cuda.device(images.device), amp:
            if self._pool is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            buffer = images.clone()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    self.network(buffer)
            torch.cuda.current_stream().wait_stream(self._stream)
            # Recording empties the cache, too, so do it before memory is measured.
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            # Memory is only reused within a stream, so all graphs are recorded on the same one.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                out = self.network(buffer)
            held = torch.cuda.memory_reserved() - before + buffer.nbytes

        def replay(images: Tensor) -> object:
            with torch.cuda.device(images.device):
                buffer.copy_(images)
                graph.replay()
                # Clone the outputs, because the next replay overwrites them.
                return tree_map_only(Tensor, torch.clone, out)

        return replay, held

    def _is_full(self) -> bool:
        if self.held_bytes < self.max_bytes:
            return False
        if self.max_bytes and not self._told:
            self._told = True
            logger.warning(
                "CUDA graphs for %d kinds of images hold %d MiB, max_graph_bytes is %d MiB: "
                "other kinds run without",
                *(len(self.replays), self.held_bytes >> 20, self.max_bytes >> 20),
            )
        return True

    def __call__(self, images: Tensor) -> object:
        key = self._key(images)
        if key not in self.replays:
            if key not in self._seen or self._is_full():
                self._seen.add(key)
                return self.network(images)
            self.replays[key], held = self.record(images)
            self.held_bytes += held
        return self.replays[key](images)


class OptimizedNetwork(nn.Module):
    """A network that :func:`optimize_for_inference` has optimized.

    It has the attributes of the network, and the same names of tensors and modules. Moving, casting
    or loading weights, and ``deepcopy``, discard the recorded graphs.

    Args:
        network: called with a batch of images (N, C, H, W).
        dtype: data type of its weights.
        backend: backend of ``torch.compile``; None does not compile.
        max_graph_bytes: as in :class:`CudaGraphs`.
    """

    def __init__(
        self, network: nn.Module, dtype: torch.dtype, backend: str | None, max_graph_bytes: int
    ):
        super().__init__()
        self._network = network
        self._dtype = dtype
        self._backend = backend
        self._max_graph_bytes = max_graph_bytes
        self.training = network.training
        self._prepare()

    def _prepare(self) -> None:
        if self._backend is not None:
            self._network.compile(backend=self._backend, dynamic=False)
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self._graphs = CudaGraphs(self._network, self._max_graph_bytes)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> object:
        """Runs the network on images (N, C, H, W); the outputs have the images' type."""
        run = self._graphs if images.is_cuda else self._network
        out = run(images.to(self._dtype))
        return tree_map_only(Tensor, lambda tensor: tensor.to(images.dtype), out)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Copying and unpickling look up methods while the object has no attributes yet.
            if name == "_network" or name.startswith("__"):
                raise
            return getattr(self._network, name)

    def __getstate__(self) -> dict:
        state = super().__getstate__()
        del state["_graphs"]
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._prepare()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args, **kwargs) -> OptimizedNetwork:
        self._forget_graphs()
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return super()._apply(fn, *args, **kwargs)

    def named_modules(
        self, memo: set | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Iterates over modules; the network's parts have the same names as in the network."""
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
            yield from self._network.named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Returns the network's state dict."""
        return self._network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs) -> object:
        """Loads the network's state dict."""
        self._forget_graphs()
        return self._network.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Loads the weights when a model that contains this one loads its own."""
        self._forget_graphs()
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}_network.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def optimize_for_inference(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
    max_graph_bytes: int = 4 << 30,
) -> OptimizedNetwork:
    """Returns a copy of a network that is faster in inference and cannot be trained.

    On a GPU, its kernels are recorded in a CUDA graph for each kind of images that occurs a second
    time, so the CPU does not launch them one by one.

    Args:
        model: called with a batch of images (N, C, H, W), returns a tensor, or lists or dicts of
            tensors; a classifier or a detector's ``backbone``. It is not changed.
        dtype: data type of weights and computation. Images and outputs keep the images' type.
        backend: backend of ``torch.compile``, such as "inductor", which requires a compiler; None
            does not compile. Each new image shape is compiled separately.
        max_graph_bytes: GPU memory for all graphs. Once it is used up, images of other shapes run
            without graphs. The last graph may exceed it. 0: no graphs.

    Returns:
        The copy, in evaluation mode: a module with the attributes of ``model``, such as a
        backbone's ``output_shape`` and ``size_divisibility``, and the same names of tensors.

    Raises:
        ValueError: if ``max_graph_bytes`` is negative.
    """
    if max_graph_bytes < 0:
        raise ValueError(f"max_graph_bytes is {max_graph_bytes}, it must be at least 0")
    model = cast_weights(copy.deepcopy(model).eval().requires_grad_(False), dtype)
    return OptimizedNetwork(model, dtype, backend, max_graph_bytes)
