"""Lower bounds for the time of a ConTNet on a machine, from its MACs and bytes."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.timing import alternate
from contnet.modeling.contnet import ConTNet
from contnet.modeling.encoder import Attention
from contnet.modeling.macs import macs_of_call

__all__ = ["count_parts", "least_seconds", "measure_ceilings"]

# Other operations can be computed while their values are read or written.
_COUNTED = ("convolution", "linear", "attention")


def measure_ceilings(
    device: str, dtype: torch.dtype, side: int | None = None, copied: int = 2**28
) -> tuple[float, float]:
    """Measures MACs per second of a large matrix product, and bytes per second of a large copy.

    Args:
        device: cpu or cuda.
        dtype: type of the matrices.
        side: side of the matrices.
        copied: number of bytes that the copy reads.
    """
    side = side or (8192 if device == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(copied, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    ways = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    seconds = {name: median(times) for name, times in alternate(ways, 10, 2).items()}
    return side**3 / seconds["product"], 2 * source.numel() / seconds["copy"]


def _moved(module: nn.Module, x: Tensor, out: Tensor) -> int:
    """Returns the minimum number of values that a call reads and writes."""
    if isinstance(module, Attention):
        return 4 * x.numel()  # query, key, value and the result
    return x.numel() + out.numel() + module.weight.numel()


def count_parts(model: ConTNet, images: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Counts the minimum work of a forward pass.

    Args:
        model: the network; it is moved to the meta device.
        images: shape (N, C, H, W) of the images.

    Returns:
        MACs and number of values moved, by part, such as "stages.0 linear".
    """
    parts = defaultdict(lambda: (0, 0))
    model = model.to("meta")
    handles = []
    for name, module in model.named_modules():
        place = ".".join(name.split(".")[:2]) if name.startswith("stages") else name

        def count(module: nn.Module, args: tuple, out: Tensor, place: str = place) -> None:
            for kind, number in macs_of_call(module, args[0], out):
                if kind in _COUNTED:
                    macs, moved = parts[f"{place} {kind}"]
                    moved += _moved(module, args[0], out)
                    parts[f"{place} {kind}"] = macs + number, moved

        handles.append(module.register_forward_hook(count))
    with torch.no_grad():
        model(torch.empty(images, device="meta"))
    for handle in handles:
        handle.remove()
    return dict(parts)


def least_seconds(
    parts: dict[str, tuple[int, int]], ceilings: tuple[float, float], dtype: torch.dtype
) -> dict[str, float]:
    """Returns the minimum seconds of each part, to compute or to move its bytes."""
    products, copied = ceilings
    return {
        name: max(macs / products, moved * dtype.itemsize / copied)
        for name, (macs, moved) in parts.items()
    }
