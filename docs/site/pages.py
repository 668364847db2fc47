"""Pages of the site that are made when it is built (an MkDocs hook).

README.md is the first page, other pages of the repository's root join it, and the reference of the
configuration comes from the definitions of the keys. Links lead where these pages are.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from contnet.config.comments import find_definition
from contnet.config.keys import default_config
from contnet.config.nodes import flatten
from contnet.launch.legal_values import legal_values

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "MODEL_ZOO.md": "MODEL_ZOO.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
}
_KEYS = "projects/ConTNet/contnet/config/keys.py"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_ADDRESS = re.compile(r"[a-z]+:|#")
# Groups of keys by their first words, the rest under the last one.
_HEAD = """\
# Configuration

Every key of a config, with its default and its legal values. Those of this project come first, then
those of Detectron2 whose definition has a comment. `python tools/configs.py explain KEY` prints the
same.
"""


def _moved(target: str, folder: Path) -> str | None:
    """A link of a page as the site has it; None where it leads to a file that is not in it.

    Args:
        target: the link.
        folder: of the page, from the root of the repository.
    """
    if _ADDRESS.match(target):
        return target
    path, hash_, anchor = target.partition("#")
    place = (ROOT / folder / path).resolve().relative_to(ROOT).as_posix()
    if place == _KEYS:
        return "configuration.md"
    if place in PAGES:
        return PAGES[place] + hash_ + anchor
    if place.startswith("docs/") and place.endswith((".md", ".png", ".svg")):
        return place.removeprefix("docs/") + hash_ + anchor
    return None


def _relink(text: str, folder: Path) -> str:
    def replace(match: re.Match) -> str:
        sign, label, target = match.groups()
        moved = _moved(target, folder)
        return label if moved is None else f"{sign}[{label}]({moved})"

    return _LINK.sub(replace, text)


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("<", "&lt;")


def _configuration() -> str:
    cfg = default_config()
    tables: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
    for key, value in flatten(cfg, cfg):
        definition = find_definition(key)
        if not (definition.ours or definition.comment):
            continue
        group = ".".join(key.split(".")[:2]) if key.count(".") > 1 else key.partition(".")[0]
        row = f"| `{key}` | `{value!r}` | {_cell(legal_values(key, value))} |"
        rows = tables[definition.ours].setdefault(group, [])
        rows.append(f"{row} {_cell(definition.comment)} |")
    parts = [_HEAD]
    for ours, whose in ((True, "This project"), (False, "Detectron2")):
        parts.append(f"## {whose}")
        for group, rows in tables[ours].items():
            head = ["| key | default | legal values | meaning |", "|---|---|---|---|"]
            parts += [f"### {group}{'' if ours else ' (Detectron2)'}", "\n".join([*head, *rows])]
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that do not lie in docs/."""
    for source, name in PAGES.items():
        text = _relink((ROOT / source).read_text("utf-8"), Path())
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, "configuration.md", content=_configuration()))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Moves the links of the pages of docs/."""
    if page.file.generated_by:
        return markdown
    return _relink(markdown, Path("docs"))
