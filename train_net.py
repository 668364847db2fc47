#!/usr/bin/env python
"""Trains and evaluates a model that a config file describes; ``--help`` lists the options."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # also in spawned processes, which run this file again

from contnet.launch.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
