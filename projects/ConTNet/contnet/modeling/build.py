"""Detectron2's ``build_model``, once all of our parts are in its registries."""

from detectron2.modeling import build_model

import contnet.modeling.backbone
import contnet.modeling.classifier
import contnet.modeling.fcos
import contnet.modeling.fpn
import contnet.modeling.pspnet  # noqa: F401

__all__ = ["build_model"]
