"""The command ``contnet``, whose subcommands are the scripts of the repository."""

from __future__ import annotations

import sys
from importlib import import_module

from contnet.modeling.compat import silence_known_warnings
from contnet.utils.command import EXIT_STATUSES
from contnet.utils.text import nearest
from contnet.utils.version import __version__

__all__ = ["COMMANDS", "main"]

# Name, module with a main(), description.
COMMANDS = {
    "train": ("contnet.launch.main", "train and evaluate the model of a config"),
    "submit": ("contnet.slurm.submit", "submit a training run to SLURM"),
    "predict": ("contnet.commands.predict", "run a trained model on images"),
    "report": ("contnet.commands.report", "write an HTML report of one or several runs"),
    "results": ("contnet.commands.results", "print a table of the results of several runs"),
    "export": ("contnet.commands.export", "export a trained model to ONNX or other formats"),
    "publish": ("contnet.commands.publish", "create a folder with a trained model to share"),
    "doctor": ("contnet.commands.doctor", "check the data sets of a config"),
    "configs": ("contnet.commands.configs", "list, show and compare configs, explain their keys"),
    "analyze": (
        "contnet.commands.analyze",
        "count parameters, MACs and memory of a config's model",
    ),
    "convert-weights": (
        "contnet.commands.convert_weights",
        "convert checkpoints of other projects",
    ),
    "convert-dataset": ("contnet.commands.convert_dataset", "convert VOC and YOLO data to COCO"),
    "prepare-cityscapes": ("contnet.commands.prepare_cityscapes", "draw Cityscapes' label files"),
    "make-shards": ("contnet.commands.make_shards", "pack ImageNet into shards"),
    "demo": ("contnet.commands.demo", "train a small detector on drawn shapes"),
    "demo-imagenet": ("contnet.commands.demo_imagenet", "train a small classifier on drawn shapes"),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: contnet COMMAND ...",
            "",
            f"ConTNet {__version__} on Detectron2. `contnet COMMAND --help` lists the options.",
            "",
            *lines,
            "",
            EXIT_STATUSES.rstrip(),
        ]
    )


def main() -> int:
    """Runs a subcommand and returns its exit status."""
    name, argv = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        print(
            f"error: the command {name!r} does not exist, the nearest is "
            f"{nearest(name, list(COMMANDS))}: contnet --help lists them",
            file=sys.stderr,
        )
        return 2
    # argparse shows this as the program's name, run.json as the command.
    sys.argv = [f"contnet {name}", *argv]
    silence_known_warnings()  # before Detectron2 is imported
    return import_module(COMMANDS[name][0]).main()
