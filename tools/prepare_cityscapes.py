#!/usr/bin/env python
"""Draws the missing label files of Cityscapes; ``--help`` lists the options."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.commands.prepare_cityscapes import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
