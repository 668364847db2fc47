"""A network, or a detector's backbone, made ready to infer: half precision, CUDA graphs, compiled.

Plain PyTorch; it works for any module that turns a batch of images into tensors.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["optimize_for_inference"]

_WARM_UPS = 3  # PyTorch's own advice for what goes into a CUDA graph


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts weights, but not norms with running statistics: three digits are too few for these."""
    norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    own = [norm.state_dict() for norm in norms]
    model.to(dtype)
    for norm, state in zip(norms, own, strict=True):
        norm.float().load_state_dict(state)
    return model


class _Graphs:
    """A forward pass that is recorded once for each shape of images and replayed from then on."""

    def __init__(self, forward: Callable, limit: int):
        self.forward = forward
        self.limit = limit
        self.recorded: OrderedDict[torch.Size, tuple] = OrderedDict()

    def _record(self, images: Tensor) -> tuple[Tensor, torch.cuda.CUDAGraph, object]:
        images = images.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self.forward(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.forward(images)
        return images, graph, out

    def __call__(self, images: Tensor) -> object:
        if images.shape not in self.recorded:
            if len(self.recorded) == self.limit:
                self.recorded.popitem(last=False)
            self.recorded[images.shape] = self._record(images)
        self.recorded.move_to_end(images.shape)
        buffer, graph, out = self.recorded[images.shape]
        buffer.copy_(images)
        graph.replay()
        # The next replay writes where this one did.
        return tree_map_only(Tensor, torch.clone, out)


def optimize_for_inference(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
    max_graphs: int = 8,
) -> nn.Module:
    """Makes a copy of a network that infers faster and cannot train.

    On a GPU its kernels are recorded into a CUDA graph, one for each shape of images, so that the
    processor does not start them one by one.

    Args:
        model: takes a batch of images (N, C, H, W) and returns a tensor, or lists or dicts of them;
            a classifier or a detector's ``backbone``. It stays as it is.
        dtype: of weights and computation. Images and outputs keep the images' own.
        backend: of ``torch.compile``, such as "inductor", which needs a compiler; None does not
            compile. Each new shape of images is compiled anew.
        max_graphs: shapes that are kept on a GPU, the longest unused goes first.

    Returns:
        The copy, of the same class, in evaluation mode.

    Raises:
        ValueError: if ``max_graphs`` is below 1.
    """
    if max_graphs < 1:
        raise ValueError(f"max_graphs is {max_graphs}, it must be at least 1")
    model = _cast(copy.deepcopy(model).eval().requires_grad_(False), dtype)
    run = model.forward
    if backend is not None:
        run = torch.compile(run, backend=backend, dynamic=False)
    graphs = _Graphs(run, max_graphs)

    @torch.inference_mode()
    def forward(images: Tensor) -> object:
        run_once = graphs if images.is_cuda else run
        out = run_once(images.to(dtype))
        return tree_map_only(Tensor, lambda tensor: tensor.to(images.dtype), out)

    model.forward = forward
    return model
