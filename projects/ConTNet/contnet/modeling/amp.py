"""Mixed precision from the config, on CPU and GPU."""

import torch
from detectron2.config import CfgNode
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch import Tensor, nn

__all__ = ["autocast", "grad_scaler", "keep_regions_exact"]


def _device_type(cfg: CfgNode) -> str:
    return torch.device(cfg.MODEL.DEVICE).type


def autocast(cfg: CfgNode) -> torch.autocast:
    """Returns the autocast context of SOLVER.AMP; it does nothing unless that is enabled."""
    dtype = getattr(torch, cfg.SOLVER.AMP.DTYPE)
    return torch.autocast(_device_type(cfg), dtype=dtype, enabled=cfg.SOLVER.AMP.ENABLED)


def grad_scaler(cfg: CfgNode) -> torch.amp.GradScaler:
    """Returns the loss scaler for float16; without float16, it does nothing."""
    enabled = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16"
    return torch.amp.GradScaler(_device_type(cfg), enabled=enabled)


class _ExactROIAlign(ROIAlign):
    """Detectron2's ROIAlign, without rounding the regions to the features' type."""

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        return super().forward(input.float(), rois.float()).to(input.dtype)


def _to_float(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.float()


def keep_regions_exact(model: nn.Module) -> None:
    """Makes a detector pool regions and paste masks in float32, also under autocast.

    In half precision Detectron2 rounds a region's coordinates to multiples of up to 4 pixels before
    it pools features, and the coordinates of a mask's pixels before it pastes the mask.
    """
    for module in model.modules():
        if isinstance(module, ROIPooler):
            for number, each in enumerate(module.level_poolers):
                if type(each) is ROIAlign:
                    size, scale = each.output_size, each.spatial_scale
                    module.level_poolers[number] = _ExactROIAlign(
                        size, scale, each.sampling_ratio, each.aligned
                    )
        elif isinstance(module, BaseMaskRCNNHead):
            module.predictor.register_forward_hook(_to_float)
