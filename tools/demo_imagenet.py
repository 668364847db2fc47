#!/usr/bin/env python
"""Trains and evaluates a small classifier on drawn shapes; needs no download and no GPU."""

import sys

from contnet.compat import quiet_known_noise

quiet_known_noise()  # before Detectron2 is imported

from contnet.demo_imagenet import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
