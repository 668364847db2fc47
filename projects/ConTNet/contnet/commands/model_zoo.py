"""The command line of tools/model_zoo.py, which writes MODEL_ZOO.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import yaml

from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.macs import build_meta_model, count_macs, count_parameters
from contnet.utils.command import run_command
from contnet.utils.errors import UserError
from contnet.utils.files import atomic_write
from contnet.utils.records import read_bytes
from contnet.utils.text import printable

__all__ = ["RESULTS", "ZOO", "main", "make_zoo"]

RESULTS = "docs/results.yaml"
ZOO = "MODEL_ZOO.md"

_HEAD = f"""# Model zoo

Written by `python tools/model_zoo.py` from the configs and [{RESULTS}]({RESULTS}).

"Paper" is Yan et al., 2021, [arXiv 2104.13497](https://arxiv.org/abs/2104.13497); a dash means that
it gives no figure. "Counted" figures are computed by `contnet/modeling/macs.py` from the models
of this repository: trained parameters, and multiply-adds (MACs, which the paper calls FLOPs) for
one image of the given size, without and with the matrix products of attention, which the paper
leaves out. "Here" is the result of a training in this repository on the whole data set. Speed and
memory are not measured.

No weights are shipped. The paper's detectors start from backbones pre-trained on ImageNet
([docs/weights.md](docs/weights.md)). Our runs on small sets of real images are in
[docs/real_images.md](docs/real_images.md). The counting rules and the differences from the
paper's figures are in [docs/configs.md](docs/configs.md). To train a row, use the command under its
table with the row's config and, except for ImageNet, the weights of its backbone.
"""
_NAMES = {
    "r50": "ResNet-50",
    "res18": "ResNet-18",
    "res50": "ResNet-50",
    "res101": "ResNet-101",
    "contti": "ConT-Ti",
    "conts": "ConT-S",
    "contm": "ConT-M",
    "contb": "ConT-B",
    "deit_ti": "DeiT-Ti",
    "deit_s": "DeiT-S",
    "deit_b": "DeiT-B",
}
_ORDER = tuple(_NAMES)


class _Table(TypedDict):
    paper: dict[str, dict[str, Any]]
    here: dict[str, dict[str, Any]]


def _backbone(name: str) -> str:
    """Returns the key of ``_NAMES`` that a config's name contains."""
    words = f"_{name.replace('/', '_')}_"
    return next(each for each in _ORDER if f"_{each}_" in words)


def _leaves(configs: Path, system: str) -> list[str]:
    """Lists a system's configs, plain recipes first, sorted by backbone."""
    paths = [path for path in configs.rglob("*.yaml") if not path.name.startswith("Base")]
    found = [str(path.relative_to(configs).with_suffix("")) for path in paths]
    found = [name for name in found if name.startswith(system)]

    def place(name: str) -> tuple:
        backbone = _backbone(name)
        form = name.removeprefix(system).partition(backbone)
        return form[2] != "", form[0], form[2], _ORDER.index(backbone)

    return sorted(found, key=place)


def _grouped(cells: list[str]) -> str:
    """Formats AP with s, m and l in brackets; a slash separates two tasks."""
    if len(cells) == 8:
        return " / ".join((_grouped(cells[:4]), _grouped(cells[4:])))
    first, *rest = cells
    return f"{first} ({', '.join(rest)})" if rest else first


def _figures(result: dict) -> str:
    return _grouped([str(value) for value in result["metrics"]])


def _row(table: dict, name: str, configs: Path) -> str:
    cfg = load_checked_config(str(configs / f"{name}.yaml"))
    model = build_meta_model(cfg)
    macs = count_macs(cfg, model, tuple(table["size"]))
    attention = macs.pop("attention", 0.0)
    total = sum(macs[kind] for kind in table.get("kinds", macs))
    paper, here = table["paper"].get(name, {}), table["here"].get(name, {})
    link = f"[{name.rpartition('/')[2]}](configs/{name}.yaml)"
    counted = f"{total:.2f} / {total + attention:.2f}"
    cells = [
        link,
        _NAMES[_backbone(name)],
        f"{paper.get('params', '-')}",
        f"{count_parameters(model):.2f}",
        f"{paper.get('macs', '-')}",
        counted,
        _figures(paper) if paper else "-",
        _figures(here) if here else "not trained here",
    ]
    return "| " + " | ".join(cells) + " |"


def _section(table: dict, configs: Path) -> str:
    leaves = _leaves(configs, table["system"])
    suffix = table.get("suffix", "")
    plain = [name for name in leaves if name.endswith(_backbone(name) + suffix)]
    rows = [_row(table, name, configs) for name in plain]
    height, width = table["size"]
    metric = _grouped(list(table["metrics"].values()))
    head = [
        f"## {table['title']}",
        "",
        f"| config | network | params M, paper | counted | FLOPs G, paper "
        f"| MACs G at {height}x{width}, without / with attention | {metric}, paper | here |",
        "|---|---|---|---|---|---|---|---|",
    ]
    more = [f"[{n.rpartition('/')[2]}](configs/{n}.yaml)" for n in leaves if n not in plain]
    shown = next(name for name in plain if _backbone(name) == "contm")
    command = f"python train_net.py --config-file configs/{shown}.yaml --num-gpus 8"
    if not shown.startswith("imagenet/"):
        command += " MODEL.WEIGHTS contm.pth"
    tail = ["", table["note"]]
    for name, run in table["here"].items():
        tail += ["", f"{name}: {run['run']}"]
    if more:
        tail += ["", f"Other recipes of the same models: {', '.join(more)}."]
    tail += ["", "```bash", command, "```"]
    return "\n".join([*head, *rows, *tail]) + "\n"


def make_zoo(repository: Path) -> str:
    """Returns the text of MODEL_ZOO.md.

    Args:
        repository: folder with ``configs`` and ``docs/results.yaml``.

    Raises:
        UserError: if the results cannot be read or name a config that does not exist.
    """
    configs = repository / "configs"
    try:
        tables = yaml.safe_load(read_bytes(repository / RESULTS) or b"")
        msgspec.convert(tables, list[_Table])
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = printable(" ".join(str(error).split()))
        raise UserError(f"{repository / RESULTS} cannot be read ({reason})") from error
    for table in tables:
        for name in (*table["paper"], *table["here"]):
            if not (configs / f"{name}.yaml").is_file():
                raise UserError(f"{RESULTS}: configs/{name}.yaml does not exist")
    return "\n".join([_HEAD, *(_section(table, configs) for table in tables)])


def _run() -> None:
    repository = Path(__file__).resolve().parents[4]
    text = make_zoo(repository)
    with atomic_write(repository / ZOO, "w") as file:
        file.write(text)
    print(f"wrote {repository / ZOO}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tools/model_zoo.py, which writes the page into this repository."""
    parser = argparse.ArgumentParser(
        description=f"Writes {ZOO} from the configs and {RESULTS}. It has no other options."
    )
    parser.parse_args(argv)
    return run_command(_run)
