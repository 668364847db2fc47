#!/usr/bin/env python
"""Prints the costs of each module of a config's model; ``--help`` lists the options."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.commands.analyze import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
