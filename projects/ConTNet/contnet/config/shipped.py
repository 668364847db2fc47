"""The configs that come with the package: those of ``configs/`` in the repository."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["SHIPPED_CONFIGS", "find_config"]

# In the repository, a link to its folder; in a wheel, a copy.
SHIPPED_CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def find_config(config_file: str) -> str:
    """Returns the path of a config file, or of a shipped config by its name.

    Args:
        config_file: a path. If it does not exist, a name such as ``faster_rcnn_contm``,
            ``imagenet/contm_strong.yaml`` or ``configs/faster_rcnn_contm.yaml`` refers to a
            shipped config.

    Returns:
        The path; ``config_file`` itself if neither exists.
    """
    name = config_file.removeprefix("configs/").removesuffix(".yaml")
    shipped = SHIPPED_CONFIGS / f"{name}.yaml"
    inside = not os.path.isabs(name) and ".." not in Path(name).parts
    if inside and shipped.is_file() and not os.path.lexists(config_file):
        return str(shipped)
    return config_file
