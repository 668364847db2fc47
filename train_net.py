#!/usr/bin/env python
"""Trains and evaluates a model that a config file describes; ``--help`` lists the options."""

import sys

from contnet.launch.main import main

if __name__ == "__main__":
    sys.exit(main())
