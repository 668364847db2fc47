"""ConTNet, a network that alternates convolutions with transformers on patches.

Source: Yan et al., "ConTNet: Why not use convolution and transformer at the same time?", 2021,
arXiv 2104.13497. Layer sizes follow the authors' published classification code; the treatment of
maps that are no multiple of the patch, and the dense taps, are ours (docs/network.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from contnet.modeling.block import ConTBlock
from contnet.modeling.encoder import Attention, Encoder, run_checkpointed

__all__ = [
    "FEATURES",
    "GRAD_CHECKPOINTING_MODES",
    "OUTPUT_STRIDES",
    "TAPS",
    "VARIANTS",
    "ConTNet",
    "create_model",
]

FEATURES = ("res2", "res3", "res4", "res5")
TAPS = ("stage", "pre")
OUTPUT_STRIDES = (32, 16, 8)
# What activation checkpointing computes again: nothing, MLPs, whole blocks.
GRAD_CHECKPOINTING_MODES = ("", "mlp", "block")

VARIANTS: dict[str, dict] = {
    "contnet_ti": {"depths": (1, 1, 1, 1), "dim": 48, "mlp_dims": (196, 392, 768, 768)},
    "contnet_s": {"depths": (1, 1, 1, 1), "dim": 64, "mlp_dims": (256, 512, 1024, 1024)},
    "contnet_m": {"depths": (2, 2, 2, 2), "dim": 64, "mlp_dims": (256, 512, 1024, 1024)},
    "contnet_b": {
        "depths": (3, 4, 6, 3),
        "dim": 64,
        "mlp_dims": (256, 512, 1024, 1024),
        "drop_rate": 0.1,
        "last_drop_rate": 0.2,
    },
}


class ConTNet(nn.Module):
    """ConTNet, classifier and feature extractor in one.

    Args:
        depths: blocks of each of the four stages.
        dim: channels of the stem; stage i works on ``dim * 2**i``, with ``2**i`` heads.
        mlp_dims: hidden width of each stage's MLPs.
        num_classes: of the classifier; 0 leaves it out.
        in_chans: channels of the input image.
        relative: a relative bias table in each attention instead of absolute position tables.
        pre_norm: normalise before attention and MLP instead of after their residual sums.
        use_avgdown: average-pool in the down-sampling shortcuts.
        qkv_bias: give the query, key and value projection a bias.
        drop_rate: dropout in the encoders of stages 3 and 4, in [0, 1).
        last_drop_rate: dropout on the residual sum of the very last block, in [0, 1).
        drop_path_rate: stochastic depth of the last block's residual, rising linearly from 0.
        norm_layer: makes the norm that opens each block from a number of channels.
        taps: where the features of stages 1 to 3 are taken. "stage": the last block's output,
            computed at stride 1 (twice the stage's channels). "pre": the input of the last
            block's convolution (the stage's channels).
        output_stride: of the last map, one of ``OUTPUT_STRIDES``. Below 32 the last stages keep
            their resolution and dilate instead; weights and their meaning stay the same.
        dilated_patches: where convolutions dilate, so do the patches (the same area and the
            published function); otherwise patches are of adjacent pixels (a smaller area).
    """

    def __init__(
        self,
        depths: Sequence[int],
        dim: int,
        mlp_dims: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        relative: bool = False,
        pre_norm: bool = False,
        use_avgdown: bool = False,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        last_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] | None = None,
        taps: str = "stage",
        output_stride: int = 32,
        dilated_patches: bool = True,
    ):
        super().__init__()
        if taps not in TAPS:
            raise ValueError(f"taps is {taps!r}, it must be one of {', '.join(TAPS)}")
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride is {output_stride!r}, it must be 32, 16 or 8")
        self.taps = taps
        self.output_stride = output_stride
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dim * 16
        self.grad_checkpointing = False
        self.stem = nn.Conv2d(in_chans, dim, 7, stride=2, padding=3, bias=False)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        drop_path_step = drop_path_rate / max(sum(depths) - 1, 1)
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            final = i == len(depths) - 1
            dilation = max((4 << i) // output_stride, 1)
            blocks = nn.ModuleList()
            for j in range(depth):
                last = j == depth - 1
                blocks.append(
                    ConTBlock(
                        dim << i,
                        dim << (i + last),
                        stride=2 if last and not final and 8 << i <= output_stride else 1,
                        kernel_size=1 if last and final else 3,
                        patch_sizes=(7, 7) if final else (7, 14),
                        dilation=dilation,
                        patch_dilation=dilation if dilated_patches else 1,
                        use_avgdown=use_avgdown and not final,
                        norm_layer=norm_layer or nn.BatchNorm2d,
                        drop_path=drop_path_step * (sum(depths[:i]) + j),
                        out_drop=last_drop_rate if last and final else 0.0,
                        num_heads=1 << i,
                        mlp_dim=mlp_dims[i],
                        relative=relative,
                        pre_norm=pre_norm,
                        qkv_bias=qkv_bias,
                        drop=drop_rate if i >= 2 else 0.0,
                    )
                )
            self.stages.append(blocks)
        self.head = self._make_head()
        self._set_feature_facts(dim)
        self.apply(self._init_weights)

    def _make_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return nn.Linear(self.num_features, self.num_classes)

    def _set_feature_facts(self, dim: int) -> None:
        channels = [dim << (i + (self.taps == "stage")) for i in range(3)] + [dim * 16]
        self.out_feature_channels = dict(zip(FEATURES, channels, strict=True))
        self.out_feature_strides = {
            name: min(4 << i, self.output_stride) for i, name in enumerate(FEATURES)
        }
        self.feature_info = [
            {"num_chs": channels[i], "reduction": stride, "module": f"stages.{i}"}
            for i, stride in enumerate(self.out_feature_strides.values())
        ]

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Attention) and module.bias_table is not None:
            nn.init.trunc_normal_(module.bias_table, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of norms, biases and position tables, which weight decay should leave alone."""
        tables = ("row_table", "col_table", "bias_table")
        return {n for n, p in self.named_parameters() if p.ndim == 1 or n.endswith(tables)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns of the layer groups, in timm's form, for layer-wise decay."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        """Computes parts again in the backward pass instead of keeping their activations.

        Args:
            enable: "block" or True for whole blocks, "mlp" for the encoders' MLPs alone, which
                costs less time and saves less memory; "" or False for nothing.

        Raises:
            ValueError: for anything else.
        """
        part = "block" if enable is True else enable or ""
        if part not in GRAD_CHECKPOINTING_MODES:
            raise ValueError(f"enable is {enable!r}, it must be a bool, 'mlp' or 'block'")
        self.grad_checkpointing = part == "block"
        for module in self.modules():
            if isinstance(module, Encoder):
                module.grad_checkpointing = part == "mlp"

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Puts a new head of ``num_classes`` outputs (0: none) in the place of the present one.

        Raises:
            ValueError: for a pooling other than the mean, which is all that ConTNet has.
        """
        if global_pool != "avg":
            raise ValueError(f"global_pool is {global_pool!r}, ConTNet has only 'avg'")
        self.num_classes = num_classes
        self.head = self._make_head().to(self.stem.weight)
        self.head.apply(self._init_weights)

    def _tapped_stage(self, name: str, stage: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
        """A stage's output, and the features ``name`` before down-sampling."""
        *blocks, last = stage
        for block in blocks:
            x, _ = run_checkpointed(self, block, x)
        if self.taps == "pre" and name != FEATURES[-1]:
            return run_checkpointed(self, last, x)
        tap, _ = run_checkpointed(self, last, x, True)
        # A strided convolution is the stride-1 convolution sub-sampled.
        return tap[..., :: last.stride, :: last.stride], tap

    def forward_features(
        self, x: Tensor, out_features: Sequence[str] | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Runs the stem and the stages.

        Args:
            x: images (N, in_chans, H, W) of any size.
            out_features: names from ``FEATURES``.

        Returns:
            The last map (N, num_features, ceil(H / 32), ceil(W / 32)), or, with ``out_features``,
            a dict of maps by name, at strides 4, 8, 16 and 32 (or ``output_stride``, if that is
            less). Stages after the last name do not run, and no stage pays for features that were
            not asked for.

        Raises:
            ValueError: for a name that is none of ``FEATURES``.
        """
        wanted = tuple(out_features or ())
        if unknown := [name for name in wanted if name not in FEATURES]:
            raise ValueError(f"no feature {unknown[0]!r}, there are {', '.join(FEATURES)}")
        depth = max((FEATURES.index(name) + 1 for name in wanted), default=len(FEATURES))
        features = {}
        # The blocks work on channels last, as partitions into patches are cheapest there.
        x = self.pool(self.stem(x.contiguous(memory_format=torch.channels_last)))
        for name, stage in zip(FEATURES[:depth], self.stages, strict=False):
            if name in wanted:
                x, features[name] = self._tapped_stage(name, stage, x)
            else:
                for block in stage:
                    x, _ = run_checkpointed(self, block, x)
        return features if wanted else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features by stage number, as timm's feature wrappers ask for them.

        Args:
            x: images (N, in_chans, H, W).
            indices: stages, negative ones counted from the end; a number n for the last n; None
                for all.
            norm: must be False, there is no final norm.
            stop_early: do not run stages after the last index (with ``intermediates_only``).
            output_fmt: must be "NCHW".
            intermediates_only: return the list alone, not (last map, list).
        """
        if norm or output_fmt != "NCHW":
            raise ValueError("ConTNet has no final norm, and gives its features as NCHW only")
        names = [FEATURES[i] for i in self._stage_numbers(indices)]
        if intermediates_only:
            wanted = names if stop_early else (*names, FEATURES[-1])
            features = self.forward_features(x, wanted)
            return [features[name] for name in names]
        features = self.forward_features(x, (*names, FEATURES[-1]))
        return features[FEATURES[-1]], [features[name] for name in names]

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = None,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drops the stages after the last index, and the head; returns the indices kept."""
        numbers = self._stage_numbers(indices)
        self.stages = self.stages[: max(numbers) + 1]
        if prune_head:
            self.reset_classifier(0)
        return numbers

    @staticmethod
    def _stage_numbers(indices: int | Sequence[int] | None) -> list[int]:
        count = len(FEATURES)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            return list(range(count))[-indices:]
        return [range(count)[i] for i in indices]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, num_classes) of the last map, or its mean (N, num_features)."""
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))


def create_model(name: str, num_classes: int = 1000, **options) -> ConTNet:
    """Builds a ConTNet with random weights.

    Args:
        name: one of ``VARIANTS``.
        num_classes: of the classifier; 0 leaves it out.
        **options: keyword arguments of :class:`ConTNet`; None keeps the variant's own value.

    Raises:
        ValueError: for an unknown name.
        TypeError: for an unknown option.
    """
    if name not in VARIANTS:
        raise ValueError(f"no ConTNet is called {name!r}, there are {', '.join(VARIANTS)}")
    given = {key: value for key, value in options.items() if value is not None}
    return ConTNet(**{**VARIANTS[name], "num_classes": num_classes, **given})
