"""The version of this package, which setup.cfg has too, and of those that it depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

import detectron2

__all__ = ["__version__", "installed_versions"]

__version__ = "0.1.0"

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless", "pillow", "fvcore")


def installed_versions() -> dict[str, str]:
    """Versions of what results depend on, by the names of the packages."""
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
