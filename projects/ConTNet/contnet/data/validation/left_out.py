"""Counts what training leaves out of a data set, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from contnet.data.findings import Findings
from contnet.utils.text import plural

__all__ = ["CROWD", "LeftOut"]

CROWD = "crowd"
_PLURALS = {"box": "boxes"}
_MANY = 0.05  # share of crowds that is suspicious; COCO has 0.01


class LeftOut:
    """Counts the objects and images that Detectron2 leaves out."""

    def __init__(self) -> None:
        self._objects = 0
        self._reasons: Counter[str] = Counter()
        self._trained: set[Hashable] = set()
        self._crowded: set[Hashable] = set()

    def count(self, image: Hashable, reason: str = "", stays: bool = False) -> None:
        """Counts an object.

        Args:
            image: identifies its image.
            reason: why the object is left out, such as ``CROWD`` or "box without area"; "" if it is
                not.
            stays: whether its image is kept nevertheless.
        """
        self._objects += 1
        if reason:
            self._reasons[reason] += 1
        if reason == CROWD:
            self._crowded.add(image)
        elif stays or not reason:
            self._trained.add(image)

    def check_crowds(self, evaluated: bool, findings: Findings) -> None:
        """Adds a finding if there are too many crowds, or else how many evaluation ignores."""
        crowds = self._reasons[CROWD]
        if crowds > _MANY * self._objects:
            findings.suspect(
                f"{crowds} of {plural(self._objects, 'object')} are crowds (iscrowd 1), which "
                "training skips and evaluation ignores: if each is one object, as in brush masks "
                "of some labelling tools, set iscrowd 0"
            )
        elif crowds and evaluated:
            findings.fact(f"evaluation ignores {plural(crowds, 'crowd')}")

    def tell(self, images: int, filtered: bool, findings: Findings) -> None:
        """Adds what training leaves out.

        Args:
            images: number of images.
            filtered: DATALOADER.FILTER_EMPTY_ANNOTATIONS.
            findings: receives the result.
        """
        findings.left_out = self._describe(images, filtered)
        findings.fact(findings.left_out)

    def _describe(self, images: int, filtered: bool) -> str:
        alone = len(self._crowded - self._trained)
        empty = images - len(self._trained) - alone
        reasons = [_plural(number, what) for what, number in self._reasons.items()]
        parts = [_part(self._reasons.total(), self._objects, "object", reasons)]
        counts = {"without objects": empty, "with only crowds": alone}
        what = [f"{number} {which}" for which, number in counts.items() if number]
        parts.append(_part((empty + alone) * filtered, images, "image", what * filtered))
        line = f"training skips {' and '.join(parts)}"
        if not filtered and what:
            line += f"; images {' and '.join(what)} stay (DATALOADER.FILTER_EMPTY_ANNOTATIONS)"
        return line


def _plural(number: int, what: str) -> str:
    """Returns a count of things such as "box without area", whose first word is the noun."""
    noun, _, rest = what.partition(" ")
    return f"{number} {_PLURALS.get(noun, noun + 's') if number != 1 else noun} {rest}".rstrip()


def _part(number: int, total: int, what: str, reasons: list[str]) -> str:
    why = f" ({', '.join(reasons)})" if reasons else ""
    return f"{number} of {plural(total, what)}{why}"
