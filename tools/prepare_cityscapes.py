#!/usr/bin/env python
"""Draws the label files of Cityscapes that training and evaluation need; may be run again."""

import sys

from contnet.compat import quiet_known_noise

quiet_known_noise()  # before Detectron2 is imported

from contnet.data.cityscapes import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
