"""Counts the launches of a GPU on a machine without one.

Tensors are fake and on the device "cuda", so that PyTorch uses a GPU's paths and autocast types.
"""

import contextlib
import math
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def _nbytes(tensor):
    """Returns the bytes in memory: an expanded dimension counts once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in pairs if stride)


class Launches(TorchDispatchMode):
    """Counts operations that compute or copy, and the bytes that they read and write.

    One operation counts as one launch, although it may run one or two more kernels, such as the
    gradient of a convolution.
    """

    def __init__(self):
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read, written = _tensors((args, kwargs)), _tensors(out)
        known = {_storage(tensor) for tensor in read}
        views = not func._schema.is_mutable and all(_storage(t) in known for t in written)
        if not (views or "empty" in func.__name__):
            self.count += 1
            self.bytes += sum(_nbytes(tensor) for tensor in (*read, *written))
        return out


def _attention(q, k, v, attn_mask=None, dropout_p=0.0):
    """Selects the kernel that a GPU would use; PyTorch's selection would query the missing GPU."""
    if attn_mask is None and q.dtype in _HALF:
        return _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(
                ~attn_mask, -math.inf
            )
        tokens = attn_mask.shape[-1]
        if tokens % 16:
            attn_mask = F.pad(attn_mask, (0, -tokens % 16))[..., :tokens]
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    return _aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p)[0]


@contextlib.contextmanager
def _autocast(dtype):
    """Replaces torch.autocast("cuda", dtype), which turns itself off without a GPU."""
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)


def _last_first(node, seen):
    """Yields a gradient graph's nodes from a node on, each after all nodes that it feeds."""
    if node is None or node in seen:
        return
    seen.add(node)
    for following, _ in node.next_functions:
        yield from _last_first(following, seen)
    yield node


def _backward(output, gradient):
    """Runs a gradient graph; PyTorch's engine would query the missing GPU for threads.

    Gradients of parameters are not stored, which needs no launch.
    """
    gradients = {output.grad_fn: {0: gradient}}
    for node in reversed(list(_last_first(output.grad_fn, set()))):
        given = gradients.pop(node, None)
        if given is None or node.name() == "torch::autograd::AccumulateGrad":
            continue
        inputs = [given.get(number) for number in range(len(node._input_metadata))]
        results = node.apply(*inputs) if hasattr(node, "apply") else node(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        for (following, number), grad in zip(node.next_functions, results, strict=True):
            if following is None or grad is None:
                continue
            form = following._input_metadata[number]
            grad = grad.sum_to_size(form.shape).to(form.dtype)
            sums = gradients.setdefault(following, {})
            sums[number] = sums[number] + grad if number in sums else grad


def count_launches(model, size, dtype):
    """Counts launches and bytes of the forward pass in training, and of the backward pass.

    Args:
        model: model on the CPU; only the shapes of its tensors are used.
        size: shape (N, C, H, W) of the images.
        dtype: type of autocast; float32 for none.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.backends.cudnn.flags(enabled=False):
        state = {
            name: torch.empty_like(tensor, device="cuda").requires_grad_(tensor.requires_grad)
            for name, tensor in named
        }
        images = torch.empty(size, device="cuda")
        with (
            mock.patch.object(F, "scaled_dot_product_attention", _attention),
            _autocast(dtype),
            Launches() as forward,
        ):
            output = torch.func.functional_call(model, state, (images,))
        gradient = torch.ones_like(output)
        with torch.no_grad(), Launches() as backward:
            _backward(output, gradient)
    return forward, backward
