#!/usr/bin/env python
"""Checks the data sets of a config file; ``--help`` lists the options."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.commands.doctor import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
