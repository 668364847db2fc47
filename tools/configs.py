#!/usr/bin/env python
"""Lists, resolves and compares configs, and explains their keys; ``--help`` lists the options."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.commands.configs import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
