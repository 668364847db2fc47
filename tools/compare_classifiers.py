#!/usr/bin/env python
"""Trains classifiers under one recipe and prints one table."""

import sys

from contnet.modeling.compat import quiet_known_noise

quiet_known_noise()  # before Detectron2 is imported

from contnet.commands.compare import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
