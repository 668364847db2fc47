#!/usr/bin/env python
"""Measures speed side by side; ``--help`` lists the subjects."""

import sys

from contnet.modeling.compat import quiet_known_noise

quiet_known_noise()  # before Detectron2 is imported

from benchmarks.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
