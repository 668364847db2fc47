"""ConTNet as a backbone for image classification, detection and segmentation.

The network and its checkpoints need only PyTorch; the Detectron2 side is imported on first use.
"""

from contnet.checkpoint.key_mapping import ConversionReport, convert_state_dict, revert_state_dict
from contnet.modeling import timm_models  # noqa: F401, registers the variants with timm
from contnet.modeling.contnet import ConTNet, create_model
from contnet.modeling.inference import optimize_for_inference

__all__ = [
    "ConTNet",
    "ConversionReport",
    "add_contnet_config",
    "convert_state_dict",
    "create_model",
    "optimize_for_inference",
    "revert_state_dict",
]

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "add_contnet_config":
        import contnet.modeling.build  # noqa: F401, fills Detectron2's registries
        from contnet.config import add_contnet_config

        return add_contnet_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
