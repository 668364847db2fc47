"""The command line of tools/publish.py: writes a folder with a trained model to share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from detectron2.config import CfgNode

from contnet.checkpoint.metadata import Metadata
from contnet.checkpoint.reading import read_weights
from contnet.checkpoint.writing import encode_weights, write_weights
from contnet.engine.resume import trainer_state
from contnet.evaluation.results import markdown_tables, read_results
from contnet.modeling.compat import silence_known_warnings
from contnet.prediction.predictor import build_predictor, config_of, find_weights
from contnet.utils.command import EXIT_STATUSES, run_command
from contnet.utils.errors import UserError
from contnet.utils.files import atomic_write, writing
from contnet.utils.text import plural, printable, say

__all__ = ["build_parser", "main", "publish"]

_PATHS = ("OUTPUT_DIR", "MODEL.WEIGHTS")
_EPILOG = f"""\
FOLDER must not exist. These files are written to it:

  NAME-HASH.safetensors  the best weights (their EMA, if the training kept one), with config and
                         class names, without the optimiser
  config.yaml            the full config, with paths reduced to their last part
  results.json           the evaluations of these weights
  README.md              a model card

MODEL.WEIGHTS and contnet.load_run accept the folder.

{EXIT_STATUSES}"""


def _without_folders(cfg: CfgNode) -> CfgNode:
    """Returns the config with paths reduced to their last part."""
    cfg = cfg.clone()
    cfg.defrost()
    for key in _PATHS:
        parent, _, name = key.rpartition(".")
        node = cfg[parent] if parent else cfg
        node[name] = Path(node[name]).name if "://" not in node[name] else node[name]
    cfg.DATASETS.CACHE_DIR = ""
    cfg.DATASETS.REGISTER = [
        [name, *(Path(path).name for path in paths)] for name, *paths in cfg.DATASETS.REGISTER
    ]
    return cfg


def _results(folder: Path, iteration: int | None) -> list[dict]:
    """Returns the evaluations that a run made during training after an iteration."""
    records = [each for each in read_results(str(folder)) if each["weights"] is None]
    return [each for each in records if each["iteration"] == iteration]


def _recipe(cfg: CfgNode, iteration: int | None) -> Mapping[str, object]:
    solver = cfg.SOLVER
    return {
        "architecture": cfg.MODEL.META_ARCHITECTURE,
        "data": ", ".join(cfg.DATASETS.TRAIN),
        "iterations": "not known" if iteration is None else f"{iteration + 1} of {solver.MAX_ITER}",
        "images in a batch": solver.IMS_PER_BATCH,
        "optimiser": f"{solver.OPTIMIZER}, learning rate {solver.BASE_LR:g}, "
        f"weight decay {solver.WEIGHT_DECAY:g}",
        "schedule": solver.LR_SCHEDULER_NAME,
        "EMA": f"decay {solver.EMA.DECAY:g}" if solver.EMA.ENABLED else "none",
        "precision": solver.AMP.DTYPE if solver.AMP.ENABLED else "float32",
        "started from": cfg.MODEL.WEIGHTS or "random weights",
        "seed": cfg.SEED,
    }


def _card(
    name: str, facts: Metadata, cfg: CfgNode, iteration: int | None, results: Sequence[dict]
) -> str:
    """Returns the model card in Markdown."""
    rows = {"network": facts.network, **_recipe(cfg, iteration), **facts.versions}
    table = "\n".join(f"| {key} | {printable(str(value))} |" for key, value in rows.items())
    tables = [markdown_tables(each["dataset"], each["metrics"]) for each in results]
    warnings = dict.fromkeys(line for each in results for line in each.get("warnings", ()))
    notes = "\n".join(f"- {printable(line)}" for line in warnings)
    classes = ", ".join(map(printable, facts.classes or ["not named"]))
    return f"""# {name}

Trained with ConTNet on Detectron2.

```python
import contnet

model = contnet.load_run("{name}")
found = model("image.jpg")
```

`MODEL.WEIGHTS {name}` starts a training from these weights, or evaluates them.

## Training

| | |
|---|---|
{table}

## Results

{chr(10).join(tables) or "There are no results of these weights."}

{notes}

## Classes

{classes}
"""


def publish(source: Path, target: Path) -> Path:
    """Writes a folder with a run's weights, config, results and model card.

    Args:
        source: folder of the run, or one of its checkpoints.
        target: folder to create; its name is the model's name.

    Returns:
        The path of the weights.

    Raises:
        UserError: if the run has no weights that can be loaded, or ``target`` exists.
    """
    if target.exists():
        raise UserError(f"{target} already exists: choose another folder, or remove it")
    path = find_weights(source) if source.is_dir() else source
    weights = read_weights(str(path), prefer_ema=True)
    if not weights.metadata or not weights.metadata.config:
        raise UserError(f"{path} is not a checkpoint of this project's training")
    cfg = config_of(weights)
    build_predictor(cfg.clone(), weights, "cpu")  # checks that all weights load
    cfg = _without_folders(cfg)
    iteration = trainer_state(weights.rest).get("iteration")
    facts = replace(weights.metadata, config=cfg.dump(), classes=weights.classes)
    results = _results(path.parent, iteration)
    with writing(target):
        target.mkdir(parents=True)
    data = encode_weights(weights.tensors, facts.state(), ".safetensors")
    file = write_weights(target / f"{target.name}.safetensors", data)
    texts = {
        "config.yaml": facts.config,
        "results.json": json.dumps(results, indent=1),
        "README.md": _card(target.name, facts, cfg, iteration, results),
    }
    for name, text in texts.items():
        with atomic_write(target / name, "w") as stream:
            stream.write(text)
    say(f"{plural(len(weights.tensors), 'tensor')}, {plural(len(results), 'evaluation')}: {file}")
    return file


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of tools/publish.py."""
    parser = argparse.ArgumentParser(
        description="Creates a folder with a trained model that others can use.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="RUN", help="a run's folder, or a checkpoint")
    parser.add_argument(
        "target", type=Path, metavar="FOLDER", help="folder to create; its name is the model's name"
    )
    return parser


def _run(args: argparse.Namespace) -> None:
    publish(args.source, args.target)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/publish.py and returns the exit status."""
    silence_known_warnings()
    args = build_parser().parse_args(argv)
    return run_command(lambda: _run(args))
