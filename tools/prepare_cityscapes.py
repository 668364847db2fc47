#!/usr/bin/env python
"""Draws the label files of Cityscapes that training and evaluation need; may be run again."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.commands.prepare_cityscapes import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
