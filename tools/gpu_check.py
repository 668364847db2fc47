#!/usr/bin/env python
"""Writes docs/gpu.md from the results of tools/gpu_check.sh; ``--help`` lists the options."""

import sys
from pathlib import Path

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks is not installed

from benchmarks.gpu_check import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
