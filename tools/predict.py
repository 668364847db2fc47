#!/usr/bin/env python
"""Runs a trained model on images and videos; ``--help`` lists the options."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.commands.predict import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
