#!/usr/bin/env python
"""Converts VOC's XML or YOLO's text files to COCO's format; ``--help`` lists the options."""

import sys

from contnet.commands.convert_dataset import main

if __name__ == "__main__":
    sys.exit(main())
