#!/usr/bin/env python
"""Trains and evaluates a small detector on drawn shapes; needs no download and no GPU."""

import sys

from contnet.demo import main

if __name__ == "__main__":
    sys.exit(main())
