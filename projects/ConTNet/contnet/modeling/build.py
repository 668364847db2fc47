"""Detectron2's ``build_model``, with all components of this project registered."""

import detectron2.modeling
import torch
from detectron2.config import CfgNode
from torch import nn

import contnet.modeling.backbone
import contnet.modeling.classifier
import contnet.modeling.fcos
import contnet.modeling.fpn
import contnet.modeling.pspnet  # noqa: F401
from contnet.modeling.amp import keep_regions_exact
from contnet.modeling.contnet import ConTNet

__all__ = ["ATTENTION_KERNELS", "build_model", "set_attention_kernels", "use_channels_last"]

# Kernels that each value of MODEL.CONTNET.SDPA allows besides "math", by PyTorch's names.
ATTENTION_KERNELS = {
    "flash": ("flash", "mem_efficient"),
    "efficient": ("mem_efficient",),
    "cudnn": ("cudnn",),
    "math": (),
}


def set_attention_kernels(choice: str) -> None:
    """Sets the kernels that PyTorch may use for attention on a GPU, in this process.

    Args:
        choice: value of MODEL.CONTNET.SDPA; "auto" keeps PyTorch's setting.
    """
    if choice != "auto":
        for kernel in ("flash", "mem_efficient", "cudnn"):
            switch = getattr(torch.backends.cuda, f"enable_{kernel}_sdp")
            switch(kernel in ATTENTION_KERNELS[choice])


def use_channels_last(model: nn.Module) -> None:
    """Converts the weights of all convolutions to channels_last, in place.

    Their gradients then have the same layout for any layout of the images. Otherwise, the layout of
    1x1 convolutions' gradients may differ from that of their weights, and DistributedDataParallel
    warns and copies the gradients.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.to(memory_format=torch.channels_last)


def build_model(cfg: CfgNode) -> nn.Module:
    """Builds ``cfg.MODEL.META_ARCHITECTURE``, on ``cfg.MODEL.DEVICE``.

    On a GPU, convolutions use channels_last, which is faster, and a ConTNet's attention uses
    MODEL.CONTNET.SDPA.
    """
    model = detectron2.modeling.build_model(cfg)
    keep_regions_exact(model)
    if torch.device(cfg.MODEL.DEVICE).type == "cuda":
        use_channels_last(model)
        if any(isinstance(module, ConTNet) for module in model.modules()):
            set_attention_kernels(cfg.MODEL.CONTNET.SDPA)
    return model
