"""A network, or a detector's backbone, made ready to infer: half precision, CUDA graphs, compiled.

Plain PyTorch; it works for any module that turns a batch of images into tensors.
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

_WARM_UPS = 3  # PyTorch's own advice for what goes into a CUDA graph


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts weights, but not norms with running statistics: three digits are too few for these."""
    norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    own = [norm.state_dict() for norm in norms]
    model.to(dtype)
    for norm, state in zip(norms, own, strict=True):
        norm.float().load_state_dict(state)
    return model


class CudaGraphs:
    """Runs a network; images of a kind that comes again are recorded and replayed from then on.

    A kind is shape, type, device and autocast. All graphs share one pool of memory, for no two of
    them may run at once; what each holds of its own are its images and its outputs.

    Args:
        network: takes a batch of images.
        max_bytes: once the graphs hold as much, further kinds run without; 0 for no graphs.
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
        """Records the network on such images.

        Returns:
            What replays it on others of their kind, and the bytes that it holds.
        """
        kind = images.device.type
        # A graph must not read casts of weights that autocast keeps for a while.
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
            # Recording begins with this, too: what the warm-ups have left is not the graph's.
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            # Memory is used again within a stream alone, hence one stream for all graphs.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                out = self.network(buffer)
            held = torch.cuda.memory_reserved() - before + buffer.nbytes

        def replay(images: Tensor) -> object:
            with torch.cuda.device(images.device):
                buffer.copy_(images)
                graph.replay()
                # The next replay writes where this one did.
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
    """A network around which :func:`optimize_for_inference` has put what makes it faster.

    It has the attributes of the network, and its names of tensors and modules. What moves, casts or
    loads weights, and ``deepcopy``, forget the recorded graphs.

    Args:
        network: takes a batch of images (N, C, H, W).
        dtype: of its weights.
        backend: of ``torch.compile``; None does not compile.
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
        """What the network gives for images (N, C, H, W), in their type."""
        run = self._graphs if images.is_cuda else self._network
        out = run(images.to(self._dtype))
        return tree_map_only(Tensor, lambda tensor: tensor.to(images.dtype), out)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Python also asks how to copy it, while it has no attributes yet.
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
        """As of any module, but the network's parts have the names that they have in it."""
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
            yield from self._network.named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """The network's own."""
        return self._network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs) -> object:
        """Loads the network's own."""
        self._forget_graphs()
        return self._network.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Called where a model that this is a part of loads its weights."""
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
    """Makes a copy of a network that infers faster and cannot train.

    On a GPU its kernels are recorded into a CUDA graph for each kind of images that comes a second
    time, so that the processor does not start them one by one.

    Args:
        model: takes a batch of images (N, C, H, W) and returns a tensor, or lists or dicts of them;
            a classifier or a detector's ``backbone``. It stays as it is.
        dtype: of weights and computation. Images and outputs keep the images' own.
        backend: of ``torch.compile``, such as "inductor", which needs a compiler; None does not
            compile. Each new shape of images is compiled anew.
        max_graph_bytes: memory of a GPU for all graphs; images of other shapes run without, once
            it is used up. The graph that reaches it may go beyond it. 0 records none.

    Returns:
        The copy, in evaluation mode: a module with the attributes of ``model``, such as a
        backbone's ``output_shape`` and ``size_divisibility``, and its names of tensors.

    Raises:
        ValueError: if ``max_graph_bytes`` is negative.
    """
    if max_graph_bytes < 0:
        raise ValueError(f"max_graph_bytes is {max_graph_bytes}, it must be at least 0")
    model = cast_weights(copy.deepcopy(model).eval().requires_grad_(False), dtype)
    return OptimizedNetwork(model, dtype, backend, max_graph_bytes)
