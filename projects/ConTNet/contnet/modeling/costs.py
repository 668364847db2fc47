"""Costs of a model, module by module: parameters, time, and activations for the backward pass.

MACs are counted by :mod:`contnet.modeling.macs`. The functions here run the model, on the CPU.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from statistics import median

import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from contnet.modeling.amp import autocast
from contnet.modeling.attribution import attribute, sum_of_parts
from contnet.modeling.classifier import ImageClassifier

__all__ = ["count_saved", "own_parameters", "padded_size", "time_modules"]


def padded_size(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the height and width, in pixels, of images after the model's padding."""
    if isinstance(model, ImageClassifier):
        return size
    backbone = model.backbone
    image = torch.empty(1, *size, device="meta")
    padded = ImageList.from_tensors(
        [image], backbone.size_divisibility, padding_constraints=backbone.padding_constraints
    )
    return tuple(padded.tensor.shape[-2:])


def own_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Returns each module's parameters without its children's; shared ones count for the first."""
    seen: set[nn.Parameter] = set()
    own = {}
    for name, module in model.named_modules():
        own[name] = [each for each in module.parameters(recurse=False) if each not in seen]
        seen.update(own[name])
    return own


def count_saved(cfg: CfgNode, model: nn.Module, inputs: Sequence[dict]) -> dict[str, Counter[str]]:
    """Counts the activations that a forward pass in training stores for the backward pass.

    Parameters and buffers are not counted. A tensor that several operations store counts once, for
    the first module. The pass runs in mixed precision if SOLVER.AMP is enabled.

    Args:
        cfg: the config that the model was built from.
        model: the model. It stays in training mode; its running statistics and its random state
            change.
        inputs: images with ground truth.

    Returns:
        ``numbers`` and ``bytes`` by the module's name, without those of its children.
    """
    model.train()
    tensors = [*model.parameters(), *model.buffers()]
    # Keep the storages, so that none is freed and its address reused.
    held = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    total: Counter[str] = Counter(numbers=0, bytes=0)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            held[storage.data_ptr()] = storage
            total["numbers"] += storage.nbytes() // tensor.element_size()
            total["bytes"] += storage.nbytes()
        return tensor.detach()  # otherwise, operations that store their results are never freed

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    keep = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    with attribute(model, lambda: total) as own, EventStorage(), autocast(cfg), keep:
        model(inputs)
    return own


def time_modules(model: nn.Module, inputs: Sequence[dict], rounds: int) -> dict[str, float]:
    """Times forward passes in inference, after one warm-up pass.

    Args:
        model: the model. It stays in evaluation mode.
        inputs: images.
        rounds: number of passes.

    Returns:
        Median seconds by the module's name, including its children.
    """
    model.eval()
    seconds: dict[str, list[float]] = {}
    with torch.inference_mode():
        model(inputs)
        for _ in range(rounds):
            with attribute(model, lambda: {"seconds": time.perf_counter()}) as own:
                model(inputs)
            for name, counts in sum_of_parts(own).items():
                seconds.setdefault(name, []).append(counts["seconds"])
    return {name: median(each) for name, each in seconds.items()}
