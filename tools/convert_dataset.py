#!/usr/bin/env python
"""Converts VOC XML files or YOLO text files to COCO JSON; ``--help`` lists the options."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.commands.convert_dataset import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
