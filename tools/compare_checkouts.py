#!/usr/bin/env python
"""Checks whether two checkouts train bit for bit the same; ``--help`` lists the options."""

import sys
from pathlib import Path

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks is not installed

from benchmarks.compare_checkouts import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[1]))
