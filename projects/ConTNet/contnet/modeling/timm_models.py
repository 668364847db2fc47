"""Registers the ConTNet variants with timm, so that ``timm.create_model("contnet_m")`` works."""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from contnet.modeling.contnet import VARIANTS, ConTNet, create_model

__all__ = sorted(VARIANTS)

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 224 / 256,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "stem",
            "classifier": "head",
        }
        for name in VARIANTS
    }
)


def _build(name: str, pretrained: bool, **kwargs) -> ConTNet:
    if pretrained:
        raise ValueError(
            f"{name}: no weights are published with this package; "
            "build it with pretrained=False and load a converted checkpoint"
        )
    return build_model_with_cfg(
        lambda **options: create_model(name, **options),
        name,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def contnet_ti(pretrained: bool = False, **kwargs) -> ConTNet:
    """ConT-Ti."""
    return _build("contnet_ti", pretrained, **kwargs)


@register_model
def contnet_s(pretrained: bool = False, **kwargs) -> ConTNet:
    """ConT-S."""
    return _build("contnet_s", pretrained, **kwargs)


@register_model
def contnet_m(pretrained: bool = False, **kwargs) -> ConTNet:
    """ConT-M."""
    return _build("contnet_m", pretrained, **kwargs)


@register_model
def contnet_b(pretrained: bool = False, **kwargs) -> ConTNet:
    """ConT-B."""
    return _build("contnet_b", pretrained, **kwargs)
