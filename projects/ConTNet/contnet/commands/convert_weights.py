"""The command line of tools/convert_weights.py: from one form of weights to another, checked."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import Tensor

import contnet
from contnet.checkpoint.key_mapping import convert_resnet_state_dict, revert_state_dict
from contnet.checkpoint.networks import (
    FORMS,
    HEADS,
    Network,
    find_network,
    head_of,
)
from contnet.checkpoint.reading import (
    AVERAGED,
    LAST,
    METADATA,
    class_names,
    pick_weights,
    read_checkpoint,
)
from contnet.checkpoint.reference import RUNNERS
from contnet.modeling.contnet import create_model
from contnet.utils.errors import UserError, print_error
from contnet.utils.files import atomic_write

__all__ = [
    "EXPORTS",
    "TOLERANCE",
    "Result",
    "build_parser",
    "convert",
    "largest_difference",
    "main",
]

TOLERANCE = 1e-4
# A whole number of patches at every stride, none, and odd numbers on the way.
_SIZES = ((224, 224), (160, 192), (97, 131))
_INDEX = ".relative_position_index"
_SUFFIXES = (".pth", ".safetensors")
_SEED = 0
# What --to means for either family.
_TARGETS = {
    "detectron2": {"contnet": "contnet", "resnet": "detectron2"},
    "timm": {"contnet": "contnet", "resnet": "timm"},
    "authors": {"contnet": "authors"},
}
# Gives a state the names of a form.
EXPORTS = {
    "contnet": dict,
    "timm": dict,
    "authors": revert_state_dict,
    "detectron2": convert_resnet_state_dict,
}
_EPILOG = """\
SRC is a checkpoint of the ConTNet authors, of contnet.create_model, of train_net.py (a
classifier's, or the backbone of a detector's), or a ResNet-18, 34, 50, 101 or 152 of torchvision,
timm or Detectron2. What it is, its variant and its options are found in its names and shapes.

The last line says the name of the file that was written: DST with the first eight digits of the
file's SHA-256. The exit status is 1, and nothing is written, if SRC does not fit or --check fails.

examples:
  convert_weights.py theirs.pth contm.safetensors --check
  convert_weights.py output/conts/model_best.pth conts.pth --head drop
  convert_weights.py contm-1a2b3c4d.safetensors theirs.pth --to authors
"""


@dataclass
class Result:
    """Weights in the form asked for.

    Attributes:
        form: one of the family's ``FORMS``.
        variant, options: as those of :class:`Network`, with the new head's classes.
        tensors: by the form's names.
        mapped: names in the file beside names in the result.
        new: names in the result that no tensor of the file gave.
        left: names in the file of tensors of the network that the result does without.
    """

    form: str
    variant: str
    options: dict
    tensors: dict[str, Tensor]
    mapped: list[tuple[str, str]]
    new: list[str]
    left: list[str]


def _head(text: str) -> str | int:
    if text in ("keep", "drop"):
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} must be keep, drop or a number of classes")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the tool's options."""
    parser = argparse.ArgumentParser(
        description="Converts weights of a ConTNet or a ResNet from one form to another.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="file of weights")
    parser.add_argument("target", metavar="DST", help="name ending in .pth or .safetensors")
    parser.add_argument(
        "--to",
        choices=list(_TARGETS),
        default="detectron2",
        help="whose names the result has: Detectron2's, for MODEL.WEIGHTS (the default; for a "
        "ConTNet those of contnet.create_model), timm's and torchvision's, or the ConTNet authors'",
    )
    parser.add_argument(
        "--head",
        type=_head,
        default="keep",
        metavar="keep|drop|N",
        help="keep the classifier's head, cut it off, or put a random one of N classes there",
    )
    parser.add_argument(
        "--pre-norm",
        action="store_true",
        help="the ConTNet was trained with pre_norm, which its weights do not show",
    )
    parser.add_argument(
        "--last",
        action="store_true",
        help="take the last weights of a checkpoint that has their moving average, too",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"run source and result on random images, and refuse a difference above {TOLERANCE:g}",
    )
    return parser


def _new_head(network: Network, classes: int) -> dict[str, Tensor]:
    """A random head, always the same one, as the network's own initialisation makes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        if network.family == "contnet":
            model = create_model(network.variant, **{**network.options, "num_classes": classes})
        else:
            model = timm.create_model(network.variant, num_classes=classes)
    return head_of(model.state_dict(), network.family)


def convert(network: Network, to: str, head: str | int) -> Result:
    """Brings a network's weights into another form.

    Args:
        network: is left as it is.
        to: "detectron2", "timm" or "authors".
        head: "keep", "drop", or the number of classes of a new one.

    Raises:
        UserError: if the family has no such form.
    """
    form = _TARGETS[to].get(network.family)
    if form is None:
        raise UserError(f"--to {to} is for ConTNets, and it holds a {network.variant}")
    tensors, fresh = dict(network.tensors), {}
    if head != "keep":
        tensors = {k: v for k, v in tensors.items() if not k.startswith(HEADS[network.family])}
        fresh = _new_head(network, head) if isinstance(head, int) else {}
    options = dict(network.options)
    if head != "keep":
        options["num_classes"] = 0 if head == "drop" else head
    written = EXPORTS[form]({**tensors, **fresh})
    rename = FORMS[network.family][form]
    mapped = [(network.origins[k], rename(k)) for k in tensors if rename(k) in written]
    given = {name for _, name in mapped}
    used = {name for name, _ in mapped}
    return Result(
        form,
        network.variant,
        options,
        written,
        mapped,
        new=[name for name in written if name not in given],
        left=[name for name in network.origins.values() if name not in used],
    )


@torch.no_grad()
def largest_difference(
    network: Network, result: Result, size: tuple[int, int], with_logits: bool
) -> tuple[float, float]:
    """Runs source and result on a random image, each by its own names in its own library.

    Args:
        network: the source.
        result: what became of it, as read back.
        size: (height, width) of the image, in pixels.
        with_logits: compare the logits too, not the last map alone.

    Returns:
        The largest difference, and the largest output of the source.
    """
    generator = torch.Generator().manual_seed(_SEED)
    image = torch.randn(1, network.options.get("in_chans", 3), *size, generator=generator)
    count = 2 if with_logits else 1
    source = RUNNERS[network.form](network.variant, network.options, network.native, image)
    made = RUNNERS[result.form](result.variant, result.options, result.tensors, image)
    pairs = list(zip(source[:count], made[:count], strict=True))
    difference = max((a - b).abs().max().item() for a, b in pairs)
    return difference, max(a.abs().max().item() for a, _ in pairs)


def _check(network: Network, result: Result, data: bytes, suffix: str) -> None:
    """Compares outputs; the result's tensors are those of the bytes to be written."""
    if suffix == ".pth":
        result.tensors = torch.load(io.BytesIO(data), weights_only=True)["model"]
    else:
        result.tensors = safetensors.torch.load(data)
    classes = network.options["num_classes"]
    with_logits = classes > 0 and not any(name in result.new for name in _head_names(result))
    with_logits = with_logits and result.options["num_classes"] > 0
    what = "last map and logits" if with_logits else "last map"
    for size in _SIZES:
        difference, largest = largest_difference(network, result, size, with_logits)
        shown = f"{size[0]}x{size[1]}"
        print(
            f"check    {network.form} against {result.form}, {what} at {shown}: largest difference "
            f"{difference:.2e}, largest output {largest:.2e}"
        )
        # Above 1 in relation to the outputs, since float32 rounds in relation to them.
        if not difference <= TOLERANCE * max(1.0, largest):
            raise UserError(
                f"--check: source and result differ by {difference:.2e} at {shown}, more than "
                f"{TOLERANCE:g}; nothing is written"
            )


def _head_names(result: Result) -> list[str]:
    return [name for name in result.tensors if name.startswith(("head.", "fc.", "linear."))]


def _encode(result: Result, metadata: dict, suffix: str) -> bytes:
    tensors = {name: value.contiguous().clone() for name, value in result.tensors.items()}
    if suffix == ".safetensors":
        # A single entry: several would be written in any order, and change the hash.
        return safetensors.torch.save(tensors, {METADATA: json.dumps(metadata)})
    buffer = io.BytesIO()
    torch.save({"model": tensors, METADATA: metadata}, buffer)
    return buffer.getvalue()


def _check_target(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        raise UserError(f"DST {path} must end in {' or '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"DST {path}: there is no folder {path.parent}")


def _write(path: Path, data: bytes) -> Path:
    """Writes a file whose name has the start of its hash, as torch.hub checks it."""
    digest = hashlib.sha256(data).hexdigest()
    path = path.with_name(f"{path.stem}-{digest[:8]}{path.suffix}")
    try:
        with atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _print_report(network: Network, result: Result) -> None:
    for theirs, name in result.mapped:
        print(f"mapped   {theirs} -> {name}")
    for name in network.dropped:
        why = "the network computes it" if name.endswith(_INDEX) else "no part of the network"
        print(f"dropped  {name} ({why})")
    for name in result.left:
        print(f"dropped  {name}")
    for name in network.missing:
        print(f"missing  {name}")
    for name in result.new:
        print(f"new      {name}")
    dropped = len(network.dropped) + len(result.left)
    print(
        f"tensors  {len(result.mapped)} mapped, {dropped} dropped, {len(network.missing)} missing, "
        f"{len(result.new)} new"
    )


def _was_pre_norm(content: dict) -> bool:
    """Whether a file of this tool says that its network is one with pre_norm."""
    said = content.get(METADATA)
    options = said.get("options") if isinstance(said, dict) else None
    return isinstance(options, dict) and options.get("pre_norm") is True


def _run(args: argparse.Namespace) -> None:
    target = Path(args.target)
    _check_target(target)
    content = read_checkpoint(args.source)
    with open(args.source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    state, key, others = pick_weights(content, LAST if args.last else (*AVERAGED, *LAST))
    try:
        network = find_network(state, args.pre_norm or _was_pre_norm(content))
        result = convert(network, args.to, args.head)
    except UserError as error:
        raise UserError(f"{args.source}: {error}") from error
    others = [other for other in others if other != METADATA]
    beside = f", left behind: {', '.join(others)}" if others else ""
    print(f"source   {args.source}, {f'its {key!r}' if key else 'a bare state dict'}{beside}")
    shown = ", ".join(f"{name} {value}" for name, value in network.options.items())
    print(f"network  {network.variant} by the names of {network.form} ({shown})")
    _print_report(network, result)
    metadata = {
        "variant": result.variant,
        "options": result.options,
        "form": result.form,
        "source": Path(args.source).name,
        "source_sha256": digest,
        "source_key": key,
        "contnet_version": contnet.__version__,
    }
    names = class_names(content) if args.head == "keep" else None
    # A detector's are not those of a head that its backbone may have.
    if names and len(names) == result.options["num_classes"]:
        metadata["classes"] = names
    data = _encode(result, metadata, target.suffix)
    if args.check:
        _check(network, result, data, target.suffix)
    print(_write(target, data))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of tools/convert_weights.py.

    Args:
        argv: the command line, this process's own by default.

    Returns:
        The exit status. Mistakes of the user's are one line on the error stream and status 1.
    """
    args = build_parser().parse_args(argv)
    try:
        _run(args)
    except UserError as error:
        print_error(error)
        return 1
    return 0
