#!/usr/bin/env python
"""Exports a trained model to ONNX, torch.export or TorchScript; ``--help`` lists the options."""

import sys

from contnet.modeling.compat import silence_known_warnings

silence_known_warnings()  # before Detectron2 is imported

from contnet.commands.export import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
