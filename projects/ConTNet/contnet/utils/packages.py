"""Versions of the packages that results depend on."""

import platform
from importlib.metadata import PackageNotFoundError, version

import detectron2

from contnet.utils.version import __version__

__all__ = ["installed_versions"]

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless", "pillow", "fvcore")


def installed_versions() -> dict[str, str]:
    """Returns versions by package name, including Python's."""
    found = {
        "python": platform.python_version(),
        "contnet": __version__,
        "detectron2": detectron2.__version__,
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
