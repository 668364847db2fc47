"""Makes the folder of an export: the model's file, its description and an example."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode

from contnet.export.checking import (
    Check,
    Reference,
    check_export,
    measure_speed,
    random_images,
)
from contnet.export.example import make_example
from contnet.export.formats import FORMATS, OPSET, Size, quantize, require
from contnet.export.images import prepare_images
from contnet.export.modules import ExportModule, build_module
from contnet.modeling.classifier import ImageClassifier
from contnet.modeling.pspnet import WindowSegmentor
from contnet.prediction.predictor import Predictor
from contnet.utils.errors import UsageError, UserError
from contnet.utils.files import atomic_write, writing
from contnet.utils.packages import installed_versions
from contnet.utils.text import say

__all__ = ["ExportSettings", "describe_export", "export_model"]

_CHANNELS = {"RGB": [0, 1, 2], "BGR": [2, 1, 0]}
_IMAGES = {"float32": 8, "float16": 8, "int8": 40}


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export.

    Attributes:
        format: a key of ``FORMATS``.
        backbone: export only the backbone.
        dtype: "float32" or "float16".
        int8: quantize the weights of linear layers to int8.
        check: compare with PyTorch and measure the speed.
        images: images to compare on; by default some of the test set, or drawn images.
    """

    format: str
    backbone: bool = False
    dtype: str = "float32"
    int8: bool = False
    check: bool = True
    images: Sequence[Path] = ()

    @property
    def precision(self) -> str:
        """Type of the weights, a key of ``TOLERANCES``."""
        return "int8" if self.int8 else self.dtype


def _check_settings(predictor: Predictor, settings: ExportSettings) -> None:
    """Raises an error for unsupported settings, before anything is computed."""
    classifies = isinstance(predictor.model, ImageClassifier) and not settings.backbone
    if settings.int8 and not (classifies and settings.format == "onnx"):
        raise UsageError("--int8 requires a whole classifier and --format onnx: remove it")
    if settings.int8 and settings.dtype != "float32":
        raise UsageError("--int8 requires --dtype float32: remove --dtype")
    for package in FORMATS[settings.format].packages:
        require(package, f"--format {settings.format}")
    colours = predictor.cfg.INPUT.FORMAT
    if not isinstance(predictor.model, ImageClassifier) and colours not in _CHANNELS:
        raise UserError(f"INPUT.FORMAT is {colours}, an export requires RGB or BGR")


def _fixed_size(predictor: Predictor) -> Size:
    """Returns the input size of timm networks with patch embeddings; None if it is free."""
    network = getattr(predictor.model, "network", None)
    if getattr(network, "patch_embed", None) is None:
        return None
    return (predictor.cfg.INPUT.CLASSIFIER.CROP_TEST,) * 2


def _preparation(cfg: CfgNode, classifies: bool) -> dict:
    """Returns the entries of ``model.json`` that describe how to prepare an image."""
    if classifies:
        node = cfg.INPUT.CLASSIFIER
        return {
            "channels": _CHANNELS["RGB"],
            "resize": node.RESIZE_TEST,
            "crop": node.CROP_TEST,
            "interpolation": node.INTERPOLATION_TEST,
        }
    return {
        "channels": _CHANNELS[cfg.INPUT.FORMAT],
        "short_side": cfg.INPUT.MIN_SIZE_TEST,
        "longest_side": cfg.INPUT.MAX_SIZE_TEST,
    }


def describe_export(
    predictor: Predictor, module: ExportModule, settings: ExportSettings, size: Size
) -> dict:
    """Returns the content of ``model.json`` without the check."""
    cfg, form = predictor.cfg, FORMATS[settings.format]
    versions = installed_versions()
    facts = {
        "format": settings.format,
        "file": form.file,
        "architecture": cfg.MODEL.META_ARCHITECTURE,
        "classes": predictor.class_names,
        "outputs": list(module.output_names),
        "weights": settings.precision,
        "batch": "any" if module.free_batch else 1,
        "size": list(size) if size else "any",
        "least_side": size[0] if size else module.least_side,
        # The exported model normalises its input, which has values from 0 to 255.
        "normalisation": {"mean": cfg.MODEL.PIXEL_MEAN, "std": cfg.MODEL.PIXEL_STD},
        **_preparation(cfg, isinstance(predictor.model, ImageClassifier)),
        "packages": ["numpy", "pillow", *form.runs_on],
        "versions": {name: versions[name] for name in ("python", "torch", "torchvision")},
    }
    if settings.format == "onnx":
        facts["opset"] = OPSET
    return facts


def _write_texts(target: Path, facts: dict) -> None:
    texts = {
        "model.json": json.dumps(facts, indent=1) + "\n",
        "example.py": make_example(facts),
    }
    for name, text in texts.items():
        with atomic_write(target / name, "w") as stream:
            stream.write(text)


def _check(
    predictor: Predictor, module: ExportModule, settings: ExportSettings, size: Size, path: Path
) -> tuple[Check, dict]:
    """Compares and times the written file; also returns the entry for ``model.json``."""
    runner = FORMATS[settings.format].load(path)
    reference = Reference(predictor.model, settings.backbone)
    count = _IMAGES[settings.precision]
    real, what = prepare_images(predictor, settings.images, count)
    large = [images for images in real if max(images.shape[2:]) >= module.least_side]
    if len(large) < len(real):
        what = f"{len(large)} of {len(real)} {what}, the others are too small"
    noise = random_images(module, size)
    check = check_export(runner, reference, module, [*noise, *large], settings.precision)
    say(f"check on noise and {what}: {check.describe()}")
    images = [*large, *noise][0]
    seconds, seconds_pytorch = measure_speed(runner, reference, images)
    height, width = images.shape[2:]
    say(
        f"speed: {1000 * seconds:.0f} ms for an image of {height}x{width}, PyTorch "
        f"{1000 * seconds_pytorch:.0f} ms, {torch.get_num_threads()} threads of a "
        f"{platform.machine()} CPU"
    )
    return check, {
        "passed": check.passed,
        "images": f"noise and {what}",
        "batches": check.batches,
        "sizes": sorted(map(list, check.sizes)),
        "largest_difference": check.difference,
        "tolerance": check.tolerance,
        "detections": check.detections,
        "unmatched": check.unmatched,
        "same_top1": check.same_top1 if check.top1 else None,
        "milliseconds": round(1000 * seconds, 1),
        "milliseconds_pytorch": round(1000 * seconds_pytorch, 1),
    }


def export_model(predictor: Predictor, target: Path, settings: ExportSettings) -> Path:
    """Writes a model in a format that runs where this project is not installed.

    Args:
        predictor: the trained model, on the CPU.
        target: folder to create.
        settings: settings of the export.

    Returns:
        The model's file.

    Raises:
        UserError: if the folder exists, a package is missing, the model cannot be exported in the
            format, or the export differs too much from the model.
    """
    if target.exists():
        raise UserError(f"{target} already exists: choose another folder, or remove it")
    _check_settings(predictor, settings)
    dtype = getattr(torch, settings.dtype)
    module = build_module(predictor, backbone=settings.backbone, dtype=dtype)
    size, form = _fixed_size(predictor), FORMATS[settings.format]
    facts = describe_export(predictor, module, settings, size)
    with writing(target):
        target.mkdir(parents=True)
    path = target / form.file
    try:
        form.write(module, size, path)
    except RuntimeError as error:  # base class of PyTorch's export errors
        shutil.rmtree(target)
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{settings.format} cannot write this {facts['architecture']} ({reason}): try another "
            "--format, or --backbone"
        ) from error
    if settings.int8:
        quantize(path)
    say(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, outputs {', '.join(module.output_names)}, "
        f"batch {facts['batch']}, size {'x'.join(map(str, size)) if size else 'any'} "
        f"(longer side at least {facts['least_side']} pixels)"
    )
    if isinstance(predictor.model, WindowSegmentor) and predictor.model.window is not None:
        say("note: TEST.SLIDING_WINDOW is ignored, the export processes the whole image at once")
    if settings.check:
        check, facts["check"] = _check(predictor, module, settings, size, path)
    _write_texts(target, facts)
    if settings.check and not check.passed:
        raise UserError(
            f"{target} failed its check ({check.describe()}): do not use it; it is kept for "
            "inspection"
        )
    return path
