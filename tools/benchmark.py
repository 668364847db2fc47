#!/usr/bin/env python
"""Measures speed side by side; ``--help`` lists the subjects."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from benchmarks.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
