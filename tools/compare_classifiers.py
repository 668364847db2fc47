#!/usr/bin/env python
"""Trains classifiers under one recipe and prints one table."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.commands.compare import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
