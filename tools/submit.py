#!/usr/bin/env python
"""Submits a training run of train_net.py to SLURM; ``--help`` lists the options."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.slurm.submit import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
