"""Tests the number of GPU launches in a step of the network, and the bytes that they move."""

import pytest
import torch
from launches import count_launches
from torch import nn

import contnet

# ConT-M, by batch size, autocast and GRAD_CHECKPOINTING: launches and GB of the forward pass in
# training, then of the backward pass, with the locked PyTorch. This includes the masks of margins,
# which are only made for the first batch of a size.
STEPS = {
    ((128, 3, 224, 224), "bfloat16", ""): (495, 18.89, 653, 35.63),
    ((128, 3, 224, 224), "float32", ""): (271, 36.90, 430, 70.77),
    ((128, 3, 224, 224), "bfloat16", "gelu"): (495, 18.89, 669, 38.61),
    ((2, 3, 800, 1333), "bfloat16", ""): (681, 7.03, 663, 13.07),
    ((2, 3, 800, 1333), "float32", ""): (457, 13.59, 440, 25.80),
}


def figures(model, size, dtype):
    """Returns figures as in STEPS."""
    passes = count_launches(model.train(), size, getattr(torch, dtype))
    return tuple(number for each in passes for number in (each.count, round(each.bytes / 1e9, 2)))


@pytest.mark.skipif(not torch.__version__.startswith("2.15."), reason="not the PyTorch of the lock")
@pytest.mark.parametrize(("size", "dtype", "checkpointing"), STEPS, ids=str)
def test_a_step_costs_no_more(size, dtype, checkpointing):
    """The check is exact, so that improvements are entered and later steps are held to them."""
    model = contnet.create_model("contnet_m")
    model.set_grad_checkpointing(checkpointing)
    known, found = STEPS[size, dtype, checkpointing], figures(model, size, dtype)
    more = any(a > b for a, b in zip(found, known, strict=True))
    advice = "what costs more?" if more else "it costs less: enter them"
    assert found == known, f"STEPS[{size}, {dtype!r}, {checkpointing!r}] is now {found}: {advice}"


def test_the_count_of_a_layer():
    """The layer needs nothing else: the images have no gradient."""
    layer = nn.Sequential(nn.Flatten(), nn.Linear(6, 5))
    x, weight, bias, out = (4 * size for size in (2 * 6, 6 * 5, 5, 2 * 5))
    forward, backward = count_launches(layer, (2, 3, 1, 2), torch.float32)
    assert (forward.count, forward.bytes) == (1, x + weight + bias + out)
    assert (backward.count, backward.bytes) == (2, (out + x + weight) + (out + bias))
    forward, backward = count_launches(layer, (2, 3, 1, 2), torch.bfloat16)
    assert forward.count == 1 + 3 and backward.count == 2 + 2  # and casts


def test_the_gradients_are_counted_once():
    """Gradients of the same tensor are added; those of broadcast tensors are reduced."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 1, 1))

        def forward(self, x):
            y = x + self.weight
            return y + y.exp()

    forward, backward = count_launches(Twice(), (2, 3, 4, 4), torch.float32)
    assert forward.count == 3
    assert backward.count == 3  # of exp, the sum of both, the reduction
