#!/usr/bin/env python
"""Submits to SLURM what train_net.py would run; ``--help`` lists the options."""

import sys

from contnet.modeling.compat import quiet_known_noise

quiet_known_noise()  # before Detectron2 is imported

from contnet.slurm.submit import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
