"""Sets the float32 precision of GPUs for this process."""

import warnings

import torch

__all__ = ["set_float32_precision"]


def set_float32_precision(value: str) -> None:
    """Sets how a GPU computes products and convolutions of float32 tensors, in this process.

    Args:
        value: value of SOLVER.FLOAT32_PRECISION. "tf32" rounds inputs to 10 bits of mantissa,
            "ieee" does not; "" keeps PyTorch's setting.
    """
    if not value:
        return
    backends = torch.backends
    with warnings.catch_warnings():
        # PyTorch 2.9 and later recommend fp32_precision, which older versions lack. But the
        # code of torch.compile reads the older ones, and PyTorch raises an error if the two differ.
        warnings.filterwarnings("ignore", "Please use the new API settings", UserWarning)
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = value == "tf32"
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        backends.cuda.matmul.fp32_precision = value
        backends.cudnn.conv.fp32_precision = value
