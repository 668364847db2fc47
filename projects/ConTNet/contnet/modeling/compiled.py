"""Compiles encoders with torch.compile, which fuses the operations between matrix products."""

from torch import nn
from torch._dynamo import config as dynamo
from torch._functorch import config as functorch

from contnet.modeling.encoder import Encoder
from contnet.utils.errors import UsageError

__all__ = ["compile_encoders"]

# Limit on compiled graphs: a ConTNet's encoders have seven shapes, each with and without margins,
# and with static and dynamic sizes.
_GRAPHS = 64


def compile_encoders(
    model: nn.Module, memory_budget: float = 1.0, backend: str = "inductor"
) -> None:
    """Compiles the encoders of a ConTNet when they first run; the rest is not compiled.

    Compiling the whole network would take minutes. Names of weights do not change.

    Args:
        model: contains a ConTNet.
        memory_budget: share of the activations that is kept for the backward pass, in (0, 1]; the
            rest is recomputed. This is a setting of the whole process.
        backend: backend of torch.compile.

    Raises:
        UsageError: if the model has no encoder.
    """
    encoders = [module for module in model.modules() if isinstance(module, Encoder)]
    if not encoders:
        raise UsageError("SOLVER.COMPILE is True, but the model has no ConTNet: set it False")
    functorch.activation_memory_budget = memory_budget
    # PyTorch 2.6 calls it cache_size_limit.
    name = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
    setattr(dynamo, name, max(_GRAPHS, getattr(dynamo, name)))
    for encoder in encoders:
        encoder.compile(backend=backend)
