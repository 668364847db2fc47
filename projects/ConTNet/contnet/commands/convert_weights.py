"""The command line of tools/convert_weights.py: converts weights and checks the result."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from contnet.checkpoint.content import read_content
from contnet.checkpoint.convert import TARGETS, Result, convert, largest_difference
from contnet.checkpoint.metadata import METADATA, Metadata
from contnet.checkpoint.networks import Network, find_network
from contnet.checkpoint.reading import Weights, read_weights
from contnet.checkpoint.writing import encode_weights, write_weights
from contnet.utils.command import run_command
from contnet.utils.errors import UsageError, UserError
from contnet.utils.packages import installed_versions
from contnet.utils.text import printable, say

__all__ = ["TOLERANCE", "build_parser", "main"]

TOLERANCE = 1e-4
# Sizes with only whole patches at each stride, with partial patches, and with odd sides.
_SIZES = ((224, 224), (160, 192), (97, 131))
_INDEX = ".relative_position_index"
_SUFFIXES = (".pth", ".safetensors")
_EPILOG = """\
SRC is a checkpoint of the ConTNet authors, of contnet.create_model, of train_net.py (a
classifier's, or the backbone of a detector's), or a ResNet-18, 34, 50, 101 or 152 of torchvision,
timm or Detectron2. Its kind, variant and options are detected from tensor names and shapes.

The last line shows the name of the written file: DST with the first eight digits of its SHA-256. If
SRC does not fit or --check fails, nothing is written and the exit status is 1.

examples:
  convert_weights.py theirs.pth contm.safetensors --no-pre-norm --check
  convert_weights.py output/conts/model_best.pth conts.pth --head drop
  convert_weights.py contm-1a2b3c4d.safetensors theirs.pth --to authors
"""


def _head(text: str) -> str | int:
    if text in ("keep", "drop"):
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} must be keep, drop or a number of classes")


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of tools/convert_weights.py."""
    parser = argparse.ArgumentParser(
        description="Converts weights of a ConTNet or a ResNet between formats.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="file of weights")
    parser.add_argument("target", metavar="DST", help="output file, .pth or .safetensors")
    parser.add_argument(
        "--to",
        choices=list(TARGETS),
        default="detectron2",
        help="tensor names of the result: Detectron2's, for MODEL.WEIGHTS (default; for a "
        "ConTNet those of contnet.create_model), timm's and torchvision's, or the ConTNet authors'",
    )
    parser.add_argument(
        "--head",
        type=_head,
        default="keep",
        metavar="keep|drop|N",
        help="keep the classifier's head, drop it, or replace it by a random one with N classes",
    )
    parser.add_argument(
        "--pre-norm",
        action=argparse.BooleanOptionalAction,
        help="whether the ConTNet was trained with pre_norm: required for a file that does not "
        "contain this, such as the authors', whose default is --no-pre-norm",
    )
    parser.add_argument(
        "--last",
        action="store_true",
        help="use the last weights of a checkpoint that also has their EMA",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"run source and result on random images, fail at a difference above {TOLERANCE:g}",
    )
    return parser


def _check(network: Network, result: Result, data: bytes, suffix: str) -> None:
    """Compares the outputs of the source and of the bytes to be written."""
    result.tensors = read_content(io.BytesIO(data), f"DST{suffix}")["model"]
    classes = network.options["num_classes"]
    with_logits = classes > 0 and not any(name in result.new for name in _head_names(result))
    with_logits = with_logits and result.options["num_classes"] > 0
    what = "last map and logits" if with_logits else "last map"
    for size in _SIZES:
        difference, largest = largest_difference(network, result, size, with_logits)
        shown = f"{size[0]}x{size[1]}"
        say(
            f"check    {network.form} against {result.form}, {what} at {shown}: largest difference "
            f"{difference:.2e}, largest output {largest:.2e}"
        )
        # Relative to outputs above 1, because float32 rounds relatively.
        if not difference <= TOLERANCE * max(1.0, largest):
            raise UserError(
                f"--check: source and result differ by {difference:.2e} at {shown}, more than "
                f"{TOLERANCE:g}; nothing is written"
            )


def _head_names(result: Result) -> list[str]:
    return [name for name in result.tensors if name.startswith(("head.", "fc.", "linear."))]


def _check_target(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"DST {path} must end in {' or '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"DST {path}: the folder {path.parent} does not exist")


def _print_report(network: Network, result: Result) -> None:
    for theirs, name in result.mapped:
        say(f"mapped   {printable(theirs, 200)} -> {printable(name, 200)}")
    for name in network.dropped:
        why = "the network computes it" if name.endswith(_INDEX) else "not part of the network"
        say(f"dropped  {printable(name, 200)} ({why})")
    for name in result.left:
        say(f"dropped  {printable(name, 200)}")
    for name in network.missing:
        say(f"missing  {name}")
    for name in result.new:
        say(f"new      {name}")
    dropped = len(network.dropped) + len(result.left)
    say(
        f"tensors  {len(result.mapped)} mapped, {dropped} dropped, {len(network.missing)} missing, "
        f"{len(result.new)} new"
    )


def _describe(weights: Weights, network: Network, result: Result, head: str | int) -> Metadata:
    """Returns the metadata of a result, including that of its source."""
    source = weights.metadata or Metadata(result.variant)
    # A detector's classes are not those of a head that its backbone may have.
    keeps = head == "keep" and len(weights.classes or ()) == result.options["num_classes"]
    options = {**source.options, **result.options}
    if network.stride_in_1x1 is not None:
        options["stride_in_1x1"] = network.stride_in_1x1
    return Metadata(
        network=result.variant,
        options=options,
        norm=source.norm,
        classes=weights.classes if keeps else None,
        pixels=source.pixels,
        config=source.config,
        versions=installed_versions(),
        conversion={
            "form": result.form,
            "source": Path(weights.path).name,
            "source_sha256": weights.sha256,
            "source_key": weights.key,
        },
    )


def _run(args: argparse.Namespace) -> None:
    target = Path(args.target)
    _check_target(target)
    weights = read_weights(args.source, prefer_ema=not args.last, digest=True)
    try:
        network = find_network(weights, args.pre_norm)
        result = convert(network, args.to, args.head)
    except UserError as error:
        raise UserError(f"{args.source}: {error}") from error
    others = [printable(str(other), 200) for other in weights.rest if other != METADATA]
    beside = f", not used: {', '.join(others)}" if others else ""
    key = f"its {weights.key!r}" if weights.key else "a bare state dict"
    say(f"source   {args.source}, {key}{beside}")
    shown = ", ".join(f"{name} {value}" for name, value in network.options.items())
    say(f"network  {network.variant} by the names of {network.form} ({shown})")
    _print_report(network, result)
    if network.family == "resnet" and network.stride_in_1x1 is None:
        say("unknown  whether strides are in 1x1 convolutions: assumed to be in the 3x3 ones")
    metadata = _describe(weights, network, result, args.head)
    data = encode_weights(result.tensors, metadata.state(), target.suffix)
    if args.check:
        _check(network, result, data, target.suffix)
    say(str(write_weights(target, data)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/convert_weights.py.

    Args:
        argv: command line; ``sys.argv`` by default.

    Returns:
        The exit status of :func:`contnet.utils.command.run_command`.
    """
    args = build_parser().parse_args(argv)
    return run_command(lambda: _run(args))
