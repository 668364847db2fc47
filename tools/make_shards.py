#!/usr/bin/env python
"""Makes shards of class folders of images; ``--help`` lists the options."""

import sys

from contnet.compat import quiet_known_noise

quiet_known_noise()  # before Detectron2 is imported

from contnet.data.shard_writer import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
