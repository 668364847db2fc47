"""Mixed precision as the config asks for it, on CPU and GPU."""

import torch
from detectron2.config import CfgNode

__all__ = ["autocast", "grad_scaler"]


def _device_type(cfg: CfgNode) -> str:
    return torch.device(cfg.MODEL.DEVICE).type


def autocast(cfg: CfgNode) -> torch.autocast:
    """The autocast context of SOLVER.AMP; does nothing unless that is enabled."""
    dtype = getattr(torch, cfg.SOLVER.AMP.DTYPE)
    return torch.autocast(_device_type(cfg), dtype=dtype, enabled=cfg.SOLVER.AMP.ENABLED)


def grad_scaler(cfg: CfgNode) -> torch.amp.GradScaler:
    """The loss scaler that float16 needs; one that does nothing otherwise."""
    enabled = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16"
    return torch.amp.GradScaler(_device_type(cfg), enabled=enabled)
