#!/usr/bin/env python
"""Creates a folder with a trained model that others can use; ``--help`` lists the options."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.commands.publish import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
