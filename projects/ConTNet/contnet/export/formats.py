"""Writes a module in an export format, and loads the file to run it."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_config
from torch.overrides import TorchFunctionMode

from contnet.export.modules import ExportModule
from contnet.utils.errors import UserError

__all__ = ["FORMATS", "OPSET", "Format", "Runner", "Size", "quantize", "require"]

OPSET = 20

# Function from images (N, 3, H, W) to the outputs.
Runner = Callable[[Tensor], list[Tensor]]
# Fixed height and width of an export in pixels; None if they are free.
Size = tuple[int, int] | None

# No patch size divides the maps of these images at any stage, so that tracing records the padding.
_TRACED_SIZE = (96, 160)
# Large enough that no feature map of a detector has one pixel, which torch.export specializes.
_CAPTURED_SIZE = (288, 416)
# Warnings of libraries about their own code: (category, start of the message).
_WARNINGS = (
    (torch.jit.TracerWarning, ""),  # sizes may become constants, which the check detects
    (FutureWarning, r"`torch\.jit\.(trace|script|save|load)"),
    (FutureWarning, r"`create_unbacked_symint` is deprecated"),  # torchvision's NMS calls it
    (UserWarning, r"ONNX export for RoIAlign with a non-zero sampling_ratio"),
)


def require(package: str, what: str) -> None:
    """Raises UserError if a package of the extra ``export`` is missing."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs {package}: pip install -e '.[export]'")


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        for category, message in _WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        yield


def _example(module: ExportModule, size: tuple[int, int]) -> Tensor:
    """Example images for tracing; their values do not matter."""
    return (
        torch.linspace(0, 255, 3 * size[0] * size[1])
        .view(1, 3, *size)
        .repeat(2 if module.free_batch else 1, 1, 1, 1)
    )


class _PlainConvolutions(TorchFunctionMode):
    """Makes the inputs of convolutions contiguous.

    For other inputs, torch.export checks whether they are in channels_last. The answer depends on
    whether height, width and batch size exceed 1, and the export would then reject smaller ones.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func is torch.conv2d:
            images, *rest = args
            args = (images.clone(memory_format=torch.contiguous_format), *rest)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _capture(module: ExportModule, size: Size) -> ExportedProgram:
    """Returns the program of torch.export, for any image and batch size unless they are fixed."""
    if not hasattr(symbolic_config, "backed_size_oblivious"):
        raise UserError(
            f"torch.export of PyTorch {torch.__version__} does not support free sizes: install a "
            "newer one, or use --format torchscript"
        )
    shapes = {} if size else {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    if module.free_batch:
        shapes[0] = Dim.DYNAMIC
    # Otherwise, sizes of 1 and properties of the example's size would be specialized.
    with symbolic_config.patch(backed_size_oblivious=True), _quiet(), _PlainConvolutions():
        return torch.export.export(
            module,
            (_example(module, size or _CAPTURED_SIZE),),
            dynamic_shapes=(shapes,),
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def _write_program(module: ExportModule, size: Size, path: Path) -> None:
    torch.export.save(_capture(module, size), path)


def _load_program(path: Path) -> Runner:
    program = torch.export.load(path).module()
    return lambda images: list(program(images))


def _write_onnx(module: ExportModule, size: Size, path: Path) -> None:
    program = _capture(module, size)
    with _quiet():
        written = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(module.output_names),
            verbose=False,
        )
    written.save(path)


def _load_onnx(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        found = session.run(None, {"images": images.numpy()})
        return [torch.from_numpy(each) for each in found]

    return run


@torch.no_grad()
def _write_torchscript(module: ExportModule, size: Size, path: Path) -> None:
    images = _example(module, size or _TRACED_SIZE)
    with _quiet():
        torch.jit.save(torch.jit.trace(module, (images,), check_trace=False), path)


def _load_torchscript(path: Path) -> Runner:
    with _quiet():
        traced = torch.jit.load(path)
    return lambda images: list(traced(images))


@dataclass(frozen=True)
class Format:
    """A format of exported models.

    Attributes:
        file: name of the model's file.
        write: writes a module for images of a size.
        load: loads a file as a function.
        packages: packages besides PyTorch that writing and checking need.
        runs_on: packages that the file needs to run.
    """

    file: str
    write: Callable[[ExportModule, Size, Path], None]
    load: Callable[[Path], Runner]
    packages: Sequence[str]
    runs_on: Sequence[str]


FORMATS = {
    "onnx": Format(
        "model.onnx",
        _write_onnx,
        _load_onnx,
        ("onnx", "onnxscript", "onnxruntime"),
        ("onnxruntime",),
    ),
    "torch-export": Format(
        "model.pt2", _write_program, _load_program, (), ("torch", "torchvision")
    ),
    "torchscript": Format(
        "model.pt", _write_torchscript, _load_torchscript, (), ("torch", "torchvision")
    ),
}


def quantize(path: Path) -> None:
    """Quantizes the weights of an ONNX file's matrix products to int8, in place.

    Each output channel has its own scale; activations are quantized dynamically.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.preprocess import quant_pre_process

    # Without this, quantize_dynamic logs a warning, which sets up logging for the whole process.
    quant_pre_process(path, path, skip_symbolic_shape=True)
    quantize_dynamic(
        path,
        path,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QInt8,
    )
