"""The configuration: this project's keys on top of Detectron2's, read strictly."""

from contnet.config.keys import add_contnet_config
from contnet.config.reading import (
    is_set,
    load_config,
    load_finished_config,
    parse_config,
    set_level,
)
from contnet.config.values import check_values

__all__ = [
    "add_contnet_config",
    "check_values",
    "is_set",
    "load_config",
    "load_finished_config",
    "parse_config",
    "set_level",
]
