#!/usr/bin/env python
"""Makes one HTML page of a run, or of several beside each other; ``--help`` lists the options."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.commands.report import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
