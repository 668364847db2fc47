#!/usr/bin/env python
"""Writes MODEL_ZOO.md from the configs and docs/results.yaml."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.commands.model_zoo import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
