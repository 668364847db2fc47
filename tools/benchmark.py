#!/usr/bin/env python
"""Runs a benchmark; ``--help`` lists the subjects."""

import sys
from pathlib import Path

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks is not installed

from benchmarks.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
