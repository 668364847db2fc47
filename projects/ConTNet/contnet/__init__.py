"""ConTNet as a backbone for image classification, detection and segmentation.

The network and its checkpoints need only PyTorch; the Detectron2 side is imported on first use.
"""

from contnet.checkpoint import timm_models  # noqa: F401, registers the variants with timm
from contnet.checkpoint.key_mapping import ConversionReport, convert_state_dict, revert_state_dict
from contnet.modeling.contnet import ConTNet, create_model
from contnet.modeling.inference import optimize_for_inference
from contnet.utils.version import __version__  # noqa: F401

__all__ = [
    "ConTNet",
    "ConversionReport",
    "add_contnet_config",
    "build_model",
    "convert_state_dict",
    "create_model",
    "get_config",
    "load_config",
    "load_run",
    "optimize_for_inference",
    "revert_state_dict",
]


def __getattr__(name: str):
    """Imports the names that need Detectron2, and fills its registries."""
    if name == "add_contnet_config":
        import contnet.modeling.build  # noqa: F401
        from contnet.config import add_contnet_config

        return add_contnet_config
    if name == "build_model":
        from contnet.modeling.build import build_model

        return build_model
    if name in ("get_config", "load_config"):  # by the name of a shipped config, or from a file
        from contnet.launch.preflight_config import load_checked_config

        return load_checked_config
    if name == "load_run":
        from contnet.prediction.predictor import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
