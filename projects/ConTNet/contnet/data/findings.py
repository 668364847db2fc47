"""Findings of the checks of a data set: facts, errors and notes, with each kind on one line.

Names and numbers come from files of any origin, so all text is made printable here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from contnet.utils.text import printable

__all__ = ["ERROR", "FACT", "NOTE", "SHOWN", "SUSPECT", "WARNING", "Finding", "Findings"]

# The doctor prints only ERROR and NOTE. A run stops at an ERROR and warns of SUSPECT and WARNING.
ERROR = "ERROR"  # would stop or corrupt training
SUSPECT = "SUSPECT"  # most likely a mistake: the doctor's ERROR, a run's warning
WARNING = "WARNING"  # changes what is learned or measured: the doctor's NOTE, a run's warning
NOTE = "NOTE"
FACT = "FACT"  # only counted
# Replaced by `Findings.settle` once all objects are known.
_LOST = "LOST"  # an object that Detectron2 would skip
_DOUBT = "DOUBT"  # an object whose numbers contradict each other

SHOWN = 5  # examples that are kept of each kind
_LONGEST = 2000  # characters of a kind's text
_HARMLESS = 1000  # one such object in this many is only a note


class Finding(NamedTuple):
    """A single finding.

    Attributes:
        severity: ERROR, SUSPECT, WARNING, NOTE or FACT.
        kind: what was found and what to do; the same text for all findings of a kind.
        example: where it was found; empty if ``kind`` says everything.
    """

    severity: str
    kind: str
    example: str = ""


@dataclass
class _Kind:
    count: int = 0
    examples: list[str] = field(default_factory=list)


class Findings:
    """The findings in one data set.

    Attributes:
        facts: lines that describe the data set.
        classes: names of its classes in the model's order, keyed by "objects", "label maps" or
            "labels of images".
        named: whether the data set names its classes; otherwise ``classes`` has placeholders.
        left_out: log line with what training leaves out and why; "" if nothing was counted.
    """

    def __init__(self) -> None:
        self.facts: list[str] = []
        self.classes: dict[str, list[str]] = {}
        self.named = True
        self.left_out = ""
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def fact(self, line: str) -> None:
        """Adds a line that describes the data set."""
        self.facts.append(printable(line))

    def add(self, severity: str, kind: str, example: str = "") -> None:
        found = self._kinds.setdefault((severity, kind), _Kind())
        found.count += 1
        if example and len(found.examples) < SHOWN:
            found.examples.append(printable(example))

    def error(self, kind: str, example: str = "") -> None:
        self.add(ERROR, kind, example)

    def suspect(self, kind: str, example: str = "") -> None:
        self.add(SUSPECT, kind, example)

    def warn(self, kind: str, example: str = "") -> None:
        self.add(WARNING, kind, example)

    def note(self, kind: str, example: str = "") -> None:
        self.add(NOTE, kind, example)

    def lost(self, kind: str, example: str) -> None:
        """Adds an object that Detectron2 would skip; :meth:`settle` decides the severity."""
        self.add(_LOST, kind, example)

    def doubt(self, kind: str, example: str) -> None:
        """Adds an object with contradictory numbers; :meth:`settle` decides the severity."""
        self.add(_DOUBT, kind, example)

    def settle(self, objects: int) -> None:
        """Decides the severities of lost and doubtful objects: notes if rare, as in COCO."""
        kinds = {}
        for (severity, kind), found in self._kinds.items():
            few = found.count * _HARMLESS <= objects
            if severity == _LOST:
                severity = NOTE if few else ERROR
                kind += " (training would skip these objects)"
            elif severity == _DOUBT:
                severity = NOTE if few else WARNING
            kinds[severity, kind] = found
        self._kinds = kinds

    def merge(self, other: Findings) -> None:
        """Adds the findings of another check of the same data set."""
        self.facts += other.facts
        self.classes |= other.classes
        self.left_out = self.left_out or other.left_out
        for key, found in other._kinds.items():
            kind = self._kinds.setdefault(key, _Kind())
            kind.count += found.count
            kind.examples = [*kind.examples, *found.examples][:SHOWN]

    def state(self) -> dict:
        """Returns all findings in a form that JSON can store."""
        kinds = [[*key, found.count, found.examples] for key, found in self._kinds.items()]
        return {
            "facts": self.facts,
            "classes": self.classes,
            "named": self.named,
            "left_out": self.left_out,
            "kinds": kinds,
        }

    @classmethod
    def from_state(cls, state: dict) -> Findings:
        """Restores findings from the result of :meth:`state`."""
        findings = cls()
        findings.facts, findings.classes = state["facts"], state["classes"]
        findings.named, findings.left_out = state["named"], state["left_out"]
        for severity, kind, count, examples in state["kinds"]:
            findings._kinds[severity, kind] = _Kind(count, examples)
        return findings

    def lines(self, severity: str) -> list[str]:
        """Returns a line for each kind of a severity, with the count and the first examples."""
        lines = []
        for (of_kind, kind), found in self._kinds.items():
            if of_kind != severity:
                continue
            line = printable(kind, _LONGEST)
            if found.examples:
                examples = "; ".join(found.examples)
                more = found.count - len(found.examples)
                rest = f"; ... and {more} more" if more else ""
                line += f": {found.count} [{examples}{rest}]"
            lines.append(line)
        return lines
