"""Registers the ConTNet variants with timm, so that ``timm.create_model("contnet_m")`` works.

With ``features_only``, timm's getter (the default here) returns the taps of
``forward_intermediates``, while timm's other feature classes return the outputs of the stages.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.models import (
    adapt_input_conv,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from contnet.checkpoint.key_mapping import MARKS
from contnet.modeling.contnet import FEATURES, VARIANTS, ConTNet, create_model

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

# Defaults of the options that change the network's function.
_DEFAULTS = {"relative": False, "pre_norm": False, "use_avgdown": False, "qkv_bias": True}


def _load_file(model: ConTNet, name: str, options: dict, path: str) -> None:
    """Loads all weights of a file, except a head for other classes.

    Raises:
        UserError: if the file cannot be read, or does not fit.
    """
    # Imported here, because only files need Detectron2.
    from contnet.checkpoint.loading import load_weights
    from contnet.checkpoint.metadata import Metadata
    from contnet.checkpoint.reading import read_weights

    weights = read_weights(path, prefer_ema=True)
    stem = weights.prefix + MARKS.get(weights.form, "")
    if model.in_chans != 3 and stem in weights.tensors and weights.tensors[stem].shape[1] == 3:
        weights.tensors[stem] = adapt_input_conv(model.in_chans, weights.tensors[stem])
    given = {key: value for key, value in options.items() if value is not None}
    load_weights(model, weights, whole=False, ours=Metadata(name, {**_DEFAULTS, **given}))


def _pretrained_file(name: str, pretrained_cfg: object, overlay: dict | None) -> str:
    path = resolve_pretrained_cfg(name, pretrained_cfg, overlay).file
    if not path:
        raise ValueError(
            f"{name}: no weights are published with this package; build it with pretrained=False, "
            'or give a converted file as pretrained_cfg_overlay={"file": ...}'
        )
    return str(path)


def _describe_features(
    model: ConTNet, feature_cls: str | type, out_indices: int | Sequence[int]
) -> None:
    """Sets ``feature_info`` for one of timm's feature classes."""
    classes = [feature_cls] if isinstance(feature_cls, str) else feature_cls.__mro__
    names = " ".join(getattr(each, "__name__", str(each)) for each in classes).lower()
    if "getter" in names:
        return
    indices = [] if isinstance(out_indices, int) else [i % len(FEATURES) for i in out_indices]
    if indices != sorted(indices):
        raise ValueError(
            f"out_indices {tuple(out_indices)}: feature_cls {feature_cls!r} returns features in "
            "the order of the stages, list them in it or use feature_cls 'getter'"
        )
    # timm's hooks can return the inputs of convolutions, which are the taps "pre".
    if "hook" in names and model.taps == "pre":
        return
    if model.taps == "pre":
        raise ValueError(
            f"feature_cls is {feature_cls!r}, which returns the outputs of stages, not taps='pre': "
            "use feature_cls 'getter' or 'hook'"
        )
    model.feature_info = [
        {
            "num_chs": stage[-1].conv.out_channels,
            "reduction": min(8 << i, model.output_stride),
            "module": f"stages.{i}",
        }
        for i, stage in enumerate(model.stages)
    ]


def _build(
    name: str,
    pretrained: bool,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: dict | None = None,
    **kwargs,
) -> nn.Module:
    path = _pretrained_file(name, pretrained_cfg, pretrained_cfg_overlay) if pretrained else ""
    features_only = kwargs.get("features_only", False)
    feature_cls = kwargs.get("feature_cls", "getter")
    out_indices = kwargs.get("out_indices", ())

    def make(**options) -> ConTNet:
        model = create_model(name, **options)
        if path:
            _load_file(model, name, options, path)
        if features_only:
            _describe_features(model, feature_cls, out_indices)
        return model

    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter", "flatten_sequential": True}
    return build_model_with_cfg(
        make,
        name,
        pretrained=False,  # make() has loaded the weights
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        feature_cfg=feature_cfg,
        **kwargs,
    )


@register_model
def contnet_ti(pretrained: bool = False, **kwargs) -> nn.Module:
    """ConT-Ti."""
    return _build("contnet_ti", pretrained, **kwargs)


@register_model
def contnet_s(pretrained: bool = False, **kwargs) -> nn.Module:
    """ConT-S."""
    return _build("contnet_s", pretrained, **kwargs)


@register_model
def contnet_m(pretrained: bool = False, **kwargs) -> nn.Module:
    """ConT-M."""
    return _build("contnet_m", pretrained, **kwargs)


@register_model
def contnet_b(pretrained: bool = False, **kwargs) -> nn.Module:
    """ConT-B."""
    return _build("contnet_b", pretrained, **kwargs)
