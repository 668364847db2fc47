"""Encoders compiled by torch.compile, which joins what lies between their matrix products."""

from torch import nn
from torch._dynamo import config as dynamo
from torch._functorch import config as functorch

from contnet.modeling.encoder import Encoder
from contnet.utils.errors import UsageError

__all__ = ["compile_encoders"]

# A ConTNet's encoders have seven shapes, with and without margins, of one and of many sizes.
_GRAPHS = 64


def compile_encoders(
    model: nn.Module, memory_budget: float = 1.0, backend: str = "inductor"
) -> None:
    """Has the encoders of a ConTNet compiled when they first run; the rest stays as it is.

    The whole network would take minutes to compile. Names of weights do not change.

    Args:
        model: holds a ConTNet.
        memory_budget: the share of what the forward pass would keep for the backward pass that it
            keeps, in (0, 1]; the rest is computed again. A setting of the process.
        backend: of torch.compile.

    Raises:
        UsageError: if there is no encoder.
    """
    encoders = [module for module in model.modules() if isinstance(module, Encoder)]
    if not encoders:
        raise UsageError("SOLVER.COMPILE is True, but the model has no ConTNet: set it False")
    functorch.activation_memory_budget = memory_budget
    # PyTorch 2.6 has the other name.
    name = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
    setattr(dynamo, name, max(_GRAPHS, getattr(dynamo, name)))
    for encoder in encoders:
        encoder.compile(backend=backend)
