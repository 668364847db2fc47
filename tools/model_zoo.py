#!/usr/bin/env python
"""Writes MODEL_ZOO.md anew from the configs and docs/results.yaml."""

from pathlib import Path

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.commands.model_zoo import ZOO, make_zoo  # noqa: E402

if __name__ == "__main__":
    repository = Path(__file__).resolve().parents[1]
    (repository / ZOO).write_text(make_zoo(repository))
    print(f"wrote {repository / ZOO}")
