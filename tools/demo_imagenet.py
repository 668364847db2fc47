#!/usr/bin/env python
"""Trains and evaluates a small classifier on drawn shapes, without downloads or a GPU."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.commands.demo_imagenet import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
