"""The configuration: our keys on top of Detectron2's, strict loading, and checks of the values."""

from contnet.config.keys import add_contnet_config
from contnet.config.reading import is_set, load_config
from contnet.config.values import validate

__all__ = ["add_contnet_config", "is_set", "load_config", "validate"]
