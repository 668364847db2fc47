"""Simulates a GPU on a machine without one, to find code that would fail on a GPU.

Within :func:`pretended_gpu`, everything is computed on the CPU, but tensors that code puts on
"cuda" are marked: they report that device, and must not be mixed with others. PyTorch's rules hold:
an operation needs its tensors on one device, but accepts scalar tensors of the CPU, and CPU indices
into tensors on the GPU; only copies may cross devices. Operations of the backward pass and of
torchvision are checked, too. Autocast has the types that it has on a GPU.

There are no streams, graphs or memory. A thread's tensors carry their marks, but mixed devices are
refused only in the main thread. A tensor that C++ or TorchScript makes without a source tensor,
such as zeros in a backward pass, is on the device where it is first used. The gradient of a tensor
that has changed devices is on the device of the gradient that it is computed from.
"""

import contextlib
import functools
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = ["FLOAT32_ON_GPU", "pretended_gpu"]

_CPU, _GPU = torch.device("cpu"), torch.device("cuda", 0)
_aten = torch.ops.aten

# --- marks, and the rules for mixed devices ------------------------------------------------------

# Operations that accept tensors of both devices.
_CROSSING = {
    _aten.copy_.default,
    _aten.fill_.Tensor,
    _aten._foreach_copy_.default,
    _aten.set_.source_Storage,
    _aten.set_.source_Storage_storage_offset,
}
# Operations that accept CPU indices.
_INDEXING = {_aten.index, _aten._unsafe_index, _aten.index_put, _aten.index_put_}
_INDEXING |= {_aten._index_put_impl_, _aten._unsafe_index_put}
# Operations that accept no scalar tensors of the CPU.
_STRICT = {_aten.cat, _aten.stack}
# Operations that a CPU computes many times slower in float16. A GPU adds in float32, too.
_PRODUCTS = {_aten.addmm, _aten.bmm, _aten.mm, _aten.convolution, _aten.convolution_backward}


def _tensors(values):
    """Returns the tensors in an operation's inputs or outputs."""
    if isinstance(values, Tensor):
        return [] if values.is_sparse else [values]
    nested = isinstance(values, (list, tuple))
    return [tensor for value in values for tensor in _tensors(value)] if nested else []


def _mark(tensor):
    """Returns whether a tensor is on the GPU; None if that is not determined yet."""
    # A storage's Python object and its attributes live as long as the storage.
    return not tensor.is_sparse and getattr(tensor.untyped_storage(), "marked", False)


def _device(tensor):
    return _GPU if _mark(tensor) else _CPU


def _place(tensor, device, sources=()):
    """Returns the tensor on a device; a copy of it, if it shares its storage with ``sources``."""
    marked = device.type == "cuda"
    if _mark(tensor) is not marked:
        storages = {source.untyped_storage()._cdata for source in _tensors(sources)}
        if tensor.untyped_storage()._cdata in storages:
            tensor = tensor.clone()
        tensor.untyped_storage().marked = marked
    return tensor


def _computed_in_float32(func, args, kwargs):
    """Runs an operation on float16 tensors in float32, and rounds its results."""
    args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
    return tree_map_only(Tensor, Tensor.half, func(*args, **kwargs))


class _Watch(TorchDispatchMode):
    """Checks each operation for mixed devices, and marks the results of marked tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = _tensors([*args, *kwargs.values()])
        marks = {_mark(tensor) for tensor in given}
        if True in marks and len(marks) > 1 and func not in _CROSSING:
            self._settle(func, args, kwargs)
        if func.overloadpacket in _PRODUCTS and {each.dtype for each in given} == {torch.float16}:
            out = _computed_in_float32(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        if marks != {False}:
            mark = True if True in marks else None
            known = {tensor.untyped_storage()._cdata for tensor in given}
            for tensor in _tensors(out):
                if tensor.untyped_storage()._cdata not in known:
                    tensor.untyped_storage().marked = mark
        return out

    @staticmethod
    def _settle(func, args, kwargs):
        """Puts undetermined tensors on the GPU, and refuses tensors on the CPU.

        Raises:
            RuntimeError: if an operation mixes devices.
        """
        packet, arguments = func.overloadpacket, func._schema.arguments
        given = {**dict(zip((each.name for each in arguments), args, strict=False)), **kwargs}
        if packet in _INDEXING and _mark(args[0]):
            given["indices"] = None
        for argument in arguments:
            numbers_fit = packet not in _STRICT and not argument.is_write
            for tensor in _tensors(given.get(argument.name)):
                if _mark(tensor) is None:
                    tensor.untyped_storage().marked = True
                elif not (_mark(tensor) or (numbers_fit and tensor.dim() == 0)):
                    raise RuntimeError(
                        f"{func} has tensors on {_GPU}, and one on the CPU of shape "
                        f"{tuple(tensor.shape)}"
                    )


# --- replacements for "cuda" ---------------------------------------------------------------------

_MAKERS = """
arange as_tensor empty empty_like empty_strided eye full full_like linspace logspace ones ones_like
rand rand_like randint randint_like randn randn_like randperm scalar_tensor tensor tril_indices
triu_indices zeros zeros_like
"""
_MAKING_METHODS = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros"


def _made(make):
    """Wraps a function that makes a tensor, to put it on the requested device."""

    @functools.wraps(make)
    def run(*args, device=None, pin_memory=False, **kwargs):
        if device is None:
            device = _device(args[0]) if args and isinstance(args[0], Tensor) else _CPU
        return _place(make(*args, device=_CPU, **kwargs), torch.device(device), args)

    return run


_honest_to = Tensor.to


def _to(tensor, *args, copy=False, **kwargs):
    if "other" in kwargs or (args and isinstance(args[0], Tensor)):
        other = kwargs.get("other", args[0] if args else None)
        device, dtype, layout = _device(other), other.dtype, None
    else:
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    options = {} if layout is None else {"memory_format": layout}
    out = _honest_to(tensor, dtype or tensor.dtype, copy=copy, **options)
    return out if device is None else _place(out, device, tensor)


def _only_of_the_cpu(read):
    @functools.wraps(read)
    def run(tensor, *args, **kwargs):
        if _device(tensor) is _GPU:
            raise TypeError(f"can't convert {_GPU} device type tensor to numpy")
        return read(tensor, *args, **kwargs)

    return run


_METHODS = {
    "device": property(_device),
    "is_cuda": property(lambda tensor: _device(tensor) is _GPU),
    "is_cpu": property(lambda tensor: _device(tensor) is _CPU),
    "get_device": lambda tensor: 0 if _device(tensor) is _GPU else -1,
    "to": _to,
    "cuda": lambda tensor, device=None, non_blocking=False, **layout: _to(tensor, _GPU, **layout),
    "cpu": lambda tensor, **layout: _to(tensor, _CPU, **layout),
    "type_as": _to,
    "pin_memory": lambda tensor, device=None: tensor.clone(),
    "numpy": _only_of_the_cpu(Tensor.numpy),
    "__array__": _only_of_the_cpu(Tensor.__array__),
    **{name: _made(getattr(Tensor, name)) for name in _MAKING_METHODS.split()},
}


def _clone_storage(storage):
    copy = torch.UntypedStorage(storage.nbytes()).copy_(storage)
    copy.marked = getattr(storage, "marked", False)
    return copy


_honest_place = torch.UntypedStorage.device.__get__
_STORAGE = {
    "device": property(
        lambda each: _GPU if getattr(each, "marked", False) else _honest_place(each)
    ),
    "clone": _clone_storage,
}


class _Stream:
    """A stream or event without pending work."""

    def record(self):
        pass

    def synchronize(self):
        pass

    def is_capturing(self):
        return False


class _Generator(torch.Generator):
    def __new__(cls, device=None):
        return super().__new__(cls)


_MODULE = {
    "is_available": lambda: True,
    "is_bf16_supported": lambda: True,
    # True, so that no tensor from this context is cached.
    "is_current_stream_capturing": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "max_memory_allocated": lambda: 0,
    "synchronize": lambda: None,
    "Event": _Stream,
}
_ACCELERATOR = {
    "current_accelerator": lambda check_available=False: torch.device("cuda"),
    "current_stream": _Stream,
}

# --- autocast ------------------------------------------------------------------------------------

# Computed in float32 under a GPU's autocast, but not under a CPU's.
FLOAT32_ON_GPU = (
    *("cumsum", "exp", "expm1", "group_norm", "layer_norm", "log", "log1p", "log_softmax.int"),
    *("logsumexp", "norm.Scalar", "norm.ScalarOpt_dim", "pow.Scalar", "pow.Tensor_Scalar"),
    *("pow.Tensor_Tensor", "reciprocal", "rsqrt", "softmax.int", "softplus", "sum"),
    *("sum.dim_IntList", "upsample_bilinear2d", "upsample_nearest2d"),
)


def _in_float32(operation):
    """Returns an operation as a GPU's autocast runs it."""

    def cast(tensor):
        return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

    def run(*args, **kwargs):
        args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operation(*args, **kwargs)

    return run


@contextlib.contextmanager
def _autocast_of_a_gpu():
    """Makes torch.autocast("cuda") cast on the CPU."""
    library = torch.library.Library("aten", "IMPL")
    for name in FLOAT32_ON_GPU:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(_aten, packet), overload or "default")
        library.impl(name, _in_float32(operation), "AutocastCPU")
    honest = torch.autocast.__init__

    def start(self, device_type, *args, **kwargs):
        honest(self, device_type.replace("cuda", "cpu"), *args, **kwargs)

    try:
        with mock.patch.object(torch.autocast, "__init__", start):
            yield
    finally:
        library._destroy()


@contextlib.contextmanager
def pretended_gpu():
    """Provides one simulated "cuda" device."""
    makers = {name: _made(getattr(torch, name)) for name in _MAKERS.split()}
    with contextlib.ExitStack() as stack:
        for owner, names in (
            (torch, {"Generator": _Generator, **makers}),
            (Tensor, _METHODS),
            (torch.UntypedStorage, _STORAGE),
            (torch.cuda, _MODULE),
            (torch.accelerator, _ACCELERATOR),
        ):
            stack.enter_context(mock.patch.multiple(owner, **names))
        stack.enter_context(_autocast_of_a_gpu())
        stack.enter_context(_Watch())
        yield
