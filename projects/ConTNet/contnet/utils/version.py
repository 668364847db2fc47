"""The version of this package, which setup.cfg has too."""

__all__ = ["__version__"]

__version__ = "0.1.0"
