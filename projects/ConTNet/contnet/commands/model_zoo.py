"""MODEL_ZOO.md, made from the configs, from counting, and from recorded results."""

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

Made by `python tools/model_zoo.py` from the configs and from [{RESULTS}]({RESULTS}).

"Paper" is Yan et al., 2021, [arXiv 2104.13497](https://arxiv.org/abs/2104.13497); a dash means that
it gives no figure. "Counted" is what `contnet/modeling/macs.py` finds in the models as they are
built here: trained parameters, and multiply-adds (MACs) of one image of the size named with each
table, without and with the products of attention, which the paper leaves out; the paper's word for
MACs is FLOPs. "Here" is what this repository has trained and measured on the whole data set. Speed
and memory: not measured.

No weights are shipped. The paper's AP starts from backbones that were trained on ImageNet
([docs/weights.md](docs/weights.md)); what we ran on small sets of real images is in
[docs/real_images.md](docs/real_images.md). The rule of counting, and where it differs from the
paper's figures, is in [docs/configs.md](docs/configs.md). Each row is reproduced by the command
under its table, with the row's config and, but for ImageNet, its backbone's weights.
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
    """Which of ``_NAMES`` a config's name has."""
    words = f"_{name.replace('/', '_')}_"
    return next(each for each in _ORDER if f"_{each}_" in words)


def _leaves(configs: Path, system: str) -> list[str]:
    """Names of a system's configs, plain recipes first, by backbone."""
    paths = [path for path in configs.rglob("*.yaml") if not path.name.startswith("Base")]
    found = [str(path.relative_to(configs).with_suffix("")) for path in paths]
    found = [name for name in found if name.startswith(system)]

    def place(name: str) -> tuple:
        backbone = _backbone(name)
        form = name.removeprefix(system).partition(backbone)
        return form[2] != "", form[0], form[2], _ORDER.index(backbone)

    return sorted(found, key=place)


def _grouped(cells: list[str]) -> str:
    """AP with s, m and l in brackets; of two tasks, one behind the other."""
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
    """The text of MODEL_ZOO.md.

    Args:
        repository: holds ``configs`` and ``docs/results.yaml``.

    Raises:
        UserError: for results that cannot be read, or are of a config that does not exist.
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
                raise UserError(f"{RESULTS}: there is no configs/{name}.yaml")
    return "\n".join([_HEAD, *(_section(table, configs) for table in tables)])


def _run() -> None:
    repository = Path(__file__).resolve().parents[4]
    text = make_zoo(repository)
    with atomic_write(repository / ZOO, "w") as file:
        file.write(text)
    print(f"wrote {repository / ZOO}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of tools/model_zoo.py; writes the page into this repository."""
    parser = argparse.ArgumentParser(
        description=f"Writes {ZOO} from the configs and {RESULTS}; it has no other options."
    )
    parser.parse_args(argv)
    return run_command(_run)
