#!/usr/bin/env python
"""Says whether two checkouts train the same, to the bit; ``--help`` lists the options."""

import sys
from pathlib import Path

from contnet.compat import quiet_known_noise

quiet_known_noise()  # before Detectron2 is imported

from contnet.benchmark.compare_checkouts import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[1]))
