"""The command line of tools/analyze.py: the costs of a config's model, module by module."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from contnet.commands.configs import system_of
from contnet.commands.parsing import check_positive
from contnet.config.nodes import get_value
from contnet.data.datasets.classes import CLASS_KEYS
from contnet.data.pipeline.random_inputs import random_inputs
from contnet.engine.optimizer import build_optimizer
from contnet.launch.arguments import config_parser
from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.attribution import sum_of_parts
from contnet.modeling.build import build_model
from contnet.modeling.compat import silence_known_warnings
from contnet.modeling.costs import count_saved, own_parameters, padded_size, time_modules
from contnet.modeling.macs import (
    MASKS,
    PROPOSALS,
    build_meta_model,
    count_macs_by_module,
    count_parameters,
)
from contnet.modeling.pspnet import SEGMENTORS
from contnet.utils.command import run_command
from contnet.utils.cpus import available_cpus
from contnet.utils.errors import UsageError, UserError
from contnet.utils.files import atomic_write
from contnet.utils.text import plural, printable, say

__all__ = ["analyze", "build_parser", "main"]

_EPILOG = """\
examples:
  analyze.py --config-file configs/fcos_contm.yaml --size 320x512
  analyze.py --config-file configs/imagenet/contm.yaml --batch 8 --depth 4 --json costs.json
"""
# Meta-architectures whose costs can be counted.
_ARCHITECTURES = ("FCOS", "GeneralizedRCNN", "ImageClassifier", "RetinaNet", *SEGMENTORS)
# How each value in the JSON file is obtained.
_ORIGINS = {
    "parameters": "counted",
    "macs": "counted",
    "attention_macs": "counted",
    "activations": "counted",
    "activation_bytes": "counted",
    "seconds": "measured",
    "training_step": "counted; least_peak_bytes is their sum, an estimate",
}
_SIZE = re.compile(r"(\d+)x(\d+)")
_MIB = 2**20


# --- counting and measuring ----------------------------------------------------------------------


def _default_size(cfg: CfgNode) -> tuple[int, int]:
    """Returns the height and width of a test image."""
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        return (cfg.INPUT.CLASSIFIER.CROP_TEST,) * 2
    if not cfg.INPUT.MIN_SIZE_TEST:
        raise UsageError("INPUT.MIN_SIZE_TEST is 0, so images are not resized: add --size")
    return cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(each.nbytes for each in tensors)


def _count_states(cfg: CfgNode, model: nn.Module) -> dict[str, int]:
    """Counts the bytes of a training step that do not depend on the images.

    Args:
        cfg: config that the model was built from.
        model: model from :func:`contnet.modeling.macs.build_meta_model`; its gradients are set.
    """
    optimizer = build_optimizer(cfg, model)
    trained = [each for each in model.parameters() if each.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    states = [each for state in optimizer.state.values() for each in state.values()]
    weights = _bytes([*model.parameters(), *model.buffers()])
    return {
        "weights_bytes": weights,
        "gradients_bytes": _bytes(trained),
        "optimizer_bytes": _bytes([each for each in states if isinstance(each, Tensor)]),
        "ema_bytes": weights if cfg.SOLVER.EMA.ENABLED else 0,
    }


def _list_modules(
    model: nn.Module,
    macs: Mapping[str, Counter[str]],
    saved: Mapping[str, Counter[str]],
    seconds: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Returns the costs of each module including its children, as in :func:`analyze`."""
    own = own_parameters(model).items()
    numbers = {name: Counter(all=sum(each.numel() for each in some)) for name, some in own}
    parameters = sum_of_parts(numbers)
    return [
        {
            "name": name,
            "class": type(module).__name__,
            "parameters": parameters[name]["all"],
            "macs": round(1e9 * (macs[name].total() - macs[name]["attention"])),
            "attention_macs": round(1e9 * macs[name]["attention"]),
            "activations": saved[name]["numbers"],
            "activation_bytes": saved[name]["bytes"],
            "seconds": seconds[name],
        }
        for name, module in model.named_modules()
    ]


def analyze(
    cfg: CfgNode, size: tuple[int, int] | None = None, batch: int = 2, rounds: int = 3
) -> dict[str, Any]:
    """Counts and measures the costs of a model, on the CPU.

    Args:
        cfg: config from :func:`contnet.launch.preflight_config.load_checked_config`, with
            MODEL.DEVICE cpu.
        size: height and width of the images, in pixels; by default those of a test image.
        batch: number of images in a training step and in a timed pass.
        rounds: number of timed passes.

    Returns:
        A dict that can be written as JSON: ``size``, ``padded_size`` (as the network sees),
        ``batch``, ``classes``, ``mixed_precision``, ``origins`` (how the values are obtained),
        ``total``, ``training_step`` and ``modules``. Each module has ``name`` (``""`` for the
        model), ``class`` and, including its children, ``parameters``, ``macs`` and
        ``attention_macs`` (for one image; not part of ``macs``), ``activations`` (values that a
        training step keeps for the backward pass), ``activation_bytes``, and ``seconds`` of a
        forward pass.

    Raises:
        UsageError: if the architecture is not supported, or cannot process the size or batch.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture not in _ARCHITECTURES:
        raise UsageError(
            f"MODEL.META_ARCHITECTURE is {architecture}, which is not supported: it can be "
            f"one of {', '.join(_ARCHITECTURES)}"
        )
    size = size or _default_size(cfg)
    empty = build_meta_model(cfg)
    padded = padded_size(empty, size)
    torch.manual_seed(0)
    model = build_model(cfg)
    inputs = random_inputs(cfg, batch, size)
    try:
        macs = sum_of_parts(count_macs_by_module(cfg, empty, padded))
        saved = sum_of_parts(count_saved(cfg, model, inputs))
        seconds = time_modules(model, inputs, rounds)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = printable(" ".join(str(error).split()), 300) or type(error).__name__
        raise UsageError(
            f"{architecture} cannot process {batch} images of {size[0]}x{size[1]} ({reason}): "
            "give another --size or --batch"
        ) from error
    modules = _list_modules(model, macs, saved, seconds)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    zoo = count_parameters(empty)
    step = {**_count_states(cfg, empty), "activation_bytes": modules[0]["activation_bytes"]}
    return {
        "size": list(size),
        "padded_size": list(padded),
        "batch": batch,
        "classes": get_value(cfg, *CLASS_KEYS[architecture].values()),
        "mixed_precision": cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else None,
        "origins": _ORIGINS,
        "total": {**modules[0], "trained_parameters": trained, "zoo_parameters_m": zoo},
        "training_step": {**step, "least_peak_bytes": sum(step.values())},
        "modules": modules,
    }


# --- output --------------------------------------------------------------------------------------

_HEAD = ("module", "parameters M", "MACs G", "attention G", "activations M", "MiB", "ms", "%")
_COSTS = ("parameters", "macs", "attention_macs", "activations")


def _depth(name: str) -> int:
    return len(name.split(".")) if name else 0


def _row(module: dict[str, Any], whole: float) -> tuple[str, ...]:
    name = module["name"]
    label = "  " * _depth(name) + (name.rpartition(".")[2] or "the model")
    return (
        f"{label} ({module['class']})",
        f"{module['parameters'] / 1e6:.3f}",
        f"{module['macs'] / 1e9:.3f}",
        f"{module['attention_macs'] / 1e9:.3f}",
        f"{module['activations'] / 1e6:.2f}",
        f"{module['activation_bytes'] / _MIB:.1f}",
        f"{1e3 * module['seconds']:.1f}",
        f"{100 * module['seconds'] / whole:.0f}",
    )


def _tree(costs: dict[str, Any], depth: int) -> list[str]:
    """Lists the modules down to a depth, without those that have no counted costs."""
    whole = costs["total"]["seconds"]
    rows = [_HEAD]
    for module in costs["modules"]:
        if _depth(module["name"]) <= depth and any(module[cost] for cost in _COSTS):
            rows.append(_row(module, whole))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def _describe(costs: dict[str, Any]) -> list[str]:
    """Returns the lines above the tree: the settings, and how each value is obtained."""
    images = f"{costs['batch']} of {'x'.join(map(str, costs['size']))}"
    if costs["padded_size"] != costs["size"]:
        images += f", padded to {'x'.join(map(str, costs['padded_size']))}"
    total, machine = costs["total"], costs["machine"]
    precision = f" in {costs['mixed_precision']}" if costs["mixed_precision"] else ""
    regions = []
    if costs["system"].endswith("R-CNN"):
        regions = [
            f"          regions: MACs are for {PROPOSALS} proposals and {MASKS} masks per image,",
            "          other costs are for as many as random weights propose",
        ]
    return [
        f"config    {costs['config']}: {costs['system']}, {plural(costs['classes'], 'class')}",
        f"images    {images}; images, ground truth and weights are random",
        "counted   parameters; MACs for one image, attention products separately; activations that",
        f"          a training step{precision} keeps for the backward pass, for all images",
        "measured  ms, and % of the total: a forward pass in inference on all images, median of "
        f"{costs['rounds']},",
        f"          on this CPU ({plural(machine['cores'], 'core')}, "
        f"{plural(machine['threads'], 'thread')}, torch {machine['torch']})",
        *regions,
        f"trained   {total['trained_parameters'] / 1e6:.3f} M of the parameters; "
        f"{total['zoo_parameters_m']:.3f} M as counted in MODEL_ZOO.md",
    ]


def _memory(costs: dict[str, Any]) -> list[str]:
    names = {
        "weights_bytes": "weights and buffers (counted)",
        "gradients_bytes": "gradients (counted)",
        "optimizer_bytes": "optimiser state (counted)",
        "ema_bytes": "EMA (counted)",
        "activation_bytes": "activations (counted)",
        "least_peak_bytes": "minimum peak (estimated: sum of the above, without temporary tensors)",
    }
    step = costs["training_step"]
    return [
        "memory of a training step, MiB",
        *(f"  {step[key] / _MIB:10.1f}  {name}" for key, name in names.items() if step[key]),
    ]


# --- the command ---------------------------------------------------------------------------------


def _size(text: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(text)
    if not match or not all(size := tuple(map(int, match.groups()))):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be HEIGHTxWIDTH in pixels, such as 800x1333"
        )
    return size


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of tools/analyze.py."""
    parser = config_parser(
        "Counts parameters, MACs and memory of a config's model and measures its time, module\n"
        "by module. It needs no data, and runs on the CPU.",
        _EPILOG,
    )
    parser.add_argument(
        "--size", type=_size, metavar="HxW", help="image size (default: size of a test image)"
    )
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="batch size (default 2)")
    parser.add_argument(
        "--depth", type=int, default=2, metavar="N", help="levels of modules to show (default 2)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="number of timed passes (default 3)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write all modules to this file"
    )
    return parser


def _run(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_intermixed_args(argv)
    check_positive(args, "batch", "depth", "rounds")
    if args.json and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: the folder {args.json.parent} does not exist")
    # The whole image is processed at once, as in training.
    fixed = ["MODEL.DEVICE", "cpu", "TEST.SLIDING_WINDOW.ENABLED", "False"]
    cfg = load_checked_config(args.config_file, [*args.opts, *fixed])
    costs = {
        "config": args.config_file,
        "system": system_of(cfg),
        "machine": {
            "cores": available_cpus(),
            "threads": torch.get_num_threads(),
            "torch": version("torch"),
        },
        "rounds": args.rounds,
        **analyze(cfg, args.size, args.batch, args.rounds),
    }
    if args.json:
        with atomic_write(args.json, "w") as file:
            json.dump(costs, file, indent=1)
    say(*_describe(costs), "", *_tree(costs, args.depth), "", *_memory(costs))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/analyze.py and returns the exit status."""
    silence_known_warnings()
    return run_command(lambda: _run(argv))
