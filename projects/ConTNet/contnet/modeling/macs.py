"""Parameters and multiply-adds (MACs) of built models, by the rule behind the published figures.

The rule is that of the counter behind the baselines' figures: convolutions count with their biases,
linear layers without; BatchNorm and LayerNorm count 2 per element, GroupNorm, ReLU modules and
max-pooling 1; a box head runs on 1000 proposals and a mask head on 100. Attention products are
counted separately, because the published figures do not include them. Nothing is computed: the
model runs on the meta device, and hooks count from shapes. PyTorch counts the products of
convolutions by operator, because hooks do not see those of ConTNet's dense taps. For timm's
classifiers, whose modules are unknown, PyTorch counts all operators: convolutions and linear layers
without biases, and products of two computed arrays as attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from contnet.modeling.attribution import attribute
from contnet.modeling.build import build_model
from contnet.modeling.classifier import ImageClassifier
from contnet.modeling.encoder import Attention
from contnet.modeling.pspnet import PSPHead

__all__ = [
    "MASKS",
    "PROPOSALS",
    "build_meta_model",
    "count_macs",
    "count_macs_by_module",
    "count_parameters",
    "macs_of_call",
]

# Number of regions per image for the box head and for the mask head.
PROPOSALS = 1000
MASKS = 100
_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.LayerNorm)


def build_meta_model(cfg: CfgNode) -> nn.Module:
    """Builds the config's model on the meta device, in evaluation mode."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).eval()


def macs_of_call(module: nn.Module, x: Tensor, out: Tensor) -> Iterator[tuple[str, int]]:
    """Yields the MACs of a module's call by kind, without children; "bias" is a convolution's."""
    if isinstance(module, nn.Conv2d):
        yield "convolution", out.numel() * module.weight[0].numel()
        yield "bias", 0 if module.bias is None else out.numel()
    elif isinstance(module, nn.ConvTranspose2d):
        yield "convolution", x.numel() * module.weight[0].numel()
        yield "bias", out.numel()
    elif isinstance(module, nn.Linear):
        yield "linear", x.numel() * module.out_features
    elif isinstance(module, _NORMS):
        yield "norm", 2 * out.numel()
    elif isinstance(module, nn.GroupNorm):
        yield "norm", out.numel()
    elif isinstance(module, nn.ReLU):
        yield "relu", out.numel()
    elif isinstance(module, (nn.MaxPool2d, nn.AdaptiveAvgPool2d)):
        yield "pooling", x.numel()
    elif isinstance(module, Attention):
        batch, tokens, channels = x.shape
        yield "attention", 2 * batch * tokens**2 * channels
    elif isinstance(module, BasicStem):
        # ReLU and pooling both run at twice the output's height and width.
        yield "relu", 4 * out.numel()
        yield "pooling", 4 * out.numel()
    elif isinstance(module, BottleneckBlock):
        middle = out.numel() // 4
        yield "relu", middle * module.stride**2 + middle + out.numel()
    elif isinstance(module, BasicBlock):
        yield "relu", 2 * out.numel()


def _run_heads(cfg: CfgNode, model: nn.Module, features: dict[str, Tensor]) -> None:
    """Runs the heads, on as many regions as the rule specifies."""
    if hasattr(model, "head"):
        model.head([features[name] for name in model.head_in_features])
    elif hasattr(model, "sem_seg_head"):
        model.sem_seg_head(features)
    else:
        model.proposal_generator.rpn_head([features[name] for name in cfg.MODEL.RPN.IN_FEATURES])
        width = features[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].shape[1]
        heads, side = model.roi_heads, cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        pooled = torch.empty(PROPOSALS, width, side, side, device="meta")
        heads.box_predictor(heads.box_head(pooled))
        if cfg.MODEL.MASK_ON:
            side = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
            heads.mask_head.layers(torch.empty(MASKS, width, side, side, device="meta"))


def _kind(operator: str) -> str:
    """Returns the kind of a PyTorch operator, such as "aten.addmm"."""
    if "convolution" in operator:
        return "convolution"
    return "linear" if operator in ("aten.mm", "aten.addmm") else "attention"


def _by_operator(counter: FlopCounterMode) -> Counter[str]:
    """Returns the MACs that PyTorch has counted so far, by kind, in units of 10^9."""
    total: Counter[str] = Counter()
    for operator, number in counter.flop_counts["Global"].items():
        total[_kind(str(operator))] += number / 2e9  # PyTorch counts additions, too
    return total


def count_macs_by_module(
    cfg: CfgNode, model: nn.Module, size: tuple[int, int]
) -> dict[str, Counter[str]]:
    """Counts one image's multiply-adds (MACs) in each module, without those of its children.

    The arguments and kinds are those of :func:`count_macs`.

    Returns:
        MACs by the module's name and by kind, in units of 10^9.
    """
    image = torch.empty(1, len(cfg.MODEL.PIXEL_MEAN), *size, device="meta")
    if isinstance(model, ImageClassifier):
        counter = FlopCounterMode(display=False)
        with counter, attribute(model, lambda: _by_operator(counter)) as own:
            model.network(image)
        return own

    counter = FlopCounterMode(display=False)

    def convolutions() -> dict[str, float]:
        return {"convolution": _by_operator(counter)["convolution"]}

    names = {module: name for name, module in model.named_modules()}

    def count(module: nn.Module, args: tuple, out: Tensor) -> None:
        for kind, number in macs_of_call(module, args[0], out):
            # PyTorch counts the products of convolutions.
            if kind != "convolution":
                own[names[module]]["convolution" if kind == "bias" else kind] += number / 1e9

    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        # The hook cannot read its input, a dict.
        if not isinstance(module, PSPHead)
    ]
    try:
        with torch.no_grad(), counter, attribute(model, convolutions) as own:
            _run_heads(cfg, model, model.backbone(image))
    finally:
        for handle in handles:
            handle.remove()
    return own


def count_macs(cfg: CfgNode, model: nn.Module, size: tuple[int, int]) -> Counter[str]:
    """Counts one image's multiply-adds (MACs).

    Args:
        cfg: the config that the model was built from.
        model: from :func:`build_meta_model`.
        size: height and width of the network's input, in pixels.

    Returns:
        MACs by kind, in units of 10^9; "attention" is not included in the published figures.
    """
    total: Counter[str] = Counter()
    for counts in count_macs_by_module(cfg, model, size).values():
        total.update(counts)
    return total


def count_parameters(model: nn.Module) -> float:
    """Counts trained parameters, and frozen norms' parameters in trained layers, in millions."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for module in model.modules():
        norm = getattr(module, "norm", None)
        if isinstance(norm, FrozenBatchNorm2d) and any(
            p.requires_grad for p in module.parameters()
        ):
            total += norm.weight.numel() + norm.bias.numel()
    return total / 1e6
