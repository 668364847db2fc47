"""ConTNet, a network that alternates convolutions with transformers on patches.

Source: Yan et al., "ConTNet: Why not use convolution and transformer at the same time?", 2021,
arXiv 2104.13497. Layer sizes follow the authors' published classification code; the treatment of
maps whose size is not a multiple of the patch, and the dense taps, are ours (docs/network.md).
"""

# No `from __future__ import annotations`: torch.fx copies the annotations of forward into its code,
# which TorchScript could not compile with strings.
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from contnet.modeling.block import ConTBlock, Stage
from contnet.modeling.encoder import Attention, Encoder

__all__ = [
    "FEATURES",
    "GLOBAL_POOLS",
    "GRAD_CHECKPOINTING_MODES",
    "OUTPUT_STRIDES",
    "TAPS",
    "VARIANTS",
    "ConTNet",
    "create_model",
]

FEATURES = ("res2", "res3", "res4", "res5")
TAPS = ("stage", "pre")
GLOBAL_POOLS = ("avg", "")
OUTPUT_STRIDES = (32, 16, 8)
# What activation checkpointing recomputes: nothing, the GELUs of MLPs, MLPs, or whole blocks.
GRAD_CHECKPOINTING_MODES = ("", "gelu", "mlp", "block")

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


def _make_stage(
    number: int,
    depths: Sequence[int],
    dim: int,
    mlp_dims: Sequence[int],
    *,
    output_stride: int,
    dilated_patches: bool,
    use_avgdown: bool,
    drop_rate: float,
    last_drop_rate: float,
    drop_path_rate: float,
    **options,
) -> Stage:
    """Builds stage ``number`` (from 0); ``options`` are further arguments of its blocks."""
    final = number == len(depths) - 1
    dilation = max((4 << number) // output_stride, 1)
    drop_path_step = drop_path_rate / max(sum(depths) - 1, 1)
    blocks = []
    for i in range(depths[number]):
        last = i == depths[number] - 1
        block = ConTBlock(
            dim << number,
            dim << (number + last),
            stride=2 if last and not final and 8 << number <= output_stride else 1,
            kernel_size=1 if last and final else 3,
            patch_sizes=(7, 7) if final else (7, 14),
            dilation=dilation,
            patch_dilation=dilation if dilated_patches else 1,
            use_avgdown=use_avgdown and not final,
            drop_path=drop_path_step * (sum(depths[:number]) + i),
            out_drop=last_drop_rate if last and final else 0.0,
            num_heads=1 << number,
            mlp_dim=mlp_dims[number],
            drop=drop_rate if number >= 2 else 0.0,
            **options,
        )
        blocks.append(block)
    return Stage(*blocks)


class ConTNet(nn.Module):
    """ConTNet, classifier and feature extractor in one.

    Args:
        depths: blocks of each of the four stages.
        dim: channels of the stem; stage i (from 0) works on ``dim * 2**i``, with ``2**i`` heads.
        mlp_dims: hidden width of each stage's MLPs.
        num_classes: number of classes; 0 for no classifier.
        in_chans: channels of the input image.
        global_pool: "avg" for the mean of the last map; "" for the map itself, without classifier.
        relative: use relative position biases instead of absolute position embeddings.
        pre_norm: normalise before attention and MLP instead of after their residual sums.
        use_avgdown: use average pooling in the down-sampling shortcuts.
        qkv_bias: give the query, key and value projections a bias.
        drop_rate: dropout in the encoders of stages 3 and 4, in [0, 1).
        last_drop_rate: dropout on the residual sum of the last block, in [0, 1).
        drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0.
        norm_layer: called with a number of channels; returns the first norm of each block.
        taps: where the features of stages 1 to 3 are taken. "stage": the last block's output,
            computed at stride 1 (twice the stage's channels). "pre": the input of the last
            block's convolution (the stage's channels).
        output_stride: stride of the last map, one of ``OUTPUT_STRIDES``. Below 32, the last stages
            keep their resolution and use dilation; the same weights fit.
        dilated_patches: dilate the patches like the convolutions (the same area and the published
            function); otherwise patches consist of adjacent pixels (a smaller area).
    """

    def __init__(
        self,
        depths: Sequence[int],
        dim: int,
        mlp_dims: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
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
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dim * 16
        self.stem = nn.Conv2d(in_chans, dim, 7, stride=2, padding=3, bias=False)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        options = {
            "output_stride": output_stride,
            "dilated_patches": dilated_patches,
            "use_avgdown": use_avgdown,
            "drop_rate": drop_rate,
            "last_drop_rate": last_drop_rate,
            "drop_path_rate": drop_path_rate,
            "norm_layer": norm_layer or nn.BatchNorm2d,
            "relative": relative,
            "pre_norm": pre_norm,
            "qkv_bias": qkv_bias,
        }
        self.stages = nn.Sequential(
            *(_make_stage(i, depths, dim, mlp_dims, **options) for i in range(len(depths)))
        )
        self._set_head(num_classes, global_pool)
        self._describe_features()
        self.apply(self._init_weights)

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        if global_pool not in GLOBAL_POOLS:
            raise ValueError(f"global_pool is {global_pool!r}, it must be 'avg' or ''")
        if num_classes and not global_pool:
            raise ValueError(
                f"global_pool is '' and num_classes {num_classes}: a map has no classifier, "
                "take num_classes 0 or global_pool 'avg'"
            )
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def _describe_features(self) -> None:
        """Sets channels and strides of the features, also as timm's ``feature_info``."""
        self.out_feature_channels, self.out_feature_strides = {}, {}
        self.feature_info = []
        for i, (name, stage) in enumerate(zip(FEATURES, self.stages, strict=True)):
            where = {"module": f"stages.{i}"}
            channels, stride = stage[-1].conv.out_channels, min(4 << i, self.output_stride)
            if self.taps == "pre" and name != FEATURES[-1]:
                where = {"module": f"stages.{i}.{len(stage) - 1}.conv", "hook_type": "forward_pre"}
                channels = stage[-1].conv.in_channels
            self.out_feature_channels[name] = channels
            self.out_feature_strides[name] = stride
            self.feature_info.append({"num_chs": channels, "reduction": stride, **where})

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
        """Names of norms, biases and position tables, which should have no weight decay."""
        tables = ("row_table", "col_table", "bias_table")
        return {n for n, p in self.named_parameters() if p.ndim == 1 or n.endswith(tables)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns of the layer groups, as in timm, for layer-wise learning rate decay."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": blocks}

    @property
    @torch.jit.unused
    def grad_checkpointing(self) -> bool:
        """Whether whole blocks are recomputed in the backward pass."""
        return any(stage.grad_checkpointing for stage in self.stages)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        """Recomputes parts in the backward pass instead of storing their activations.

        Args:
            enable: "block" or True for whole blocks, "mlp" for the encoders' MLPs, "gelu" for the
                GELU in each MLP without dropout; each costs less time and saves less memory than
                the one before. "" or False for nothing.

        Raises:
            ValueError: for any other value.
        """
        part = "block" if enable is True else enable or ""
        if part not in GRAD_CHECKPOINTING_MODES:
            raise ValueError(f"enable is {enable!r}, it must be a bool, 'gelu', 'mlp' or 'block'")
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = part == "block"
            elif isinstance(module, Encoder):
                module.grad_checkpointing = part == "mlp"
                module.mlp.grad_checkpointing = part == "gelu"

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head.

        Args:
            num_classes: number of classes; 0 for no head.
            global_pool: as in the constructor; None keeps the current pooling.

        Raises:
            ValueError: for an unknown pooling, or for classes without pooling.
        """
        self._set_head(num_classes, self.global_pool if global_pool is None else global_pool)
        self.head.to(self.stem.weight).apply(self._init_weights)

    def _last_map(self, x: Tensor) -> Tensor:
        return self.stages(self._embed(x))

    def _embed(self, x: Tensor) -> Tensor:
        # Blocks use channels_last, the layout in which cutting a map into patches is cheapest.
        return self.pool(self.stem(x.contiguous(memory_format=torch.channels_last)))

    def _run_tapped(
        self, x: Tensor, numbers: Collection[int], count: int
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Runs ``count`` stages; returns the last one's output, and the taps of ``numbers``."""
        x = self._embed(x)
        taps = {}
        for i, stage in zip(range(count), self.stages, strict=False):
            if i not in numbers:
                x = stage(x)
            elif i == len(FEATURES) - 1:
                x = taps[i] = stage(x)
            elif self.taps == "pre":
                x, taps[i] = stage.forward_pre(x)
            else:
                x, taps[i] = stage.forward_dense(x)
        return x, taps

    def forward_features(
        self, x: Tensor, out_features: Sequence[str] | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Runs the stem and the stages.

        Args:
            x: images (N, in_chans, H, W) of any size.
            out_features: names from ``FEATURES``.

        Returns:
            The last map (N, num_features, ceil(H / s), ceil(W / s)), s being ``output_stride``, or,
            with ``out_features``, a dict of maps by name, at strides 4, 8, 16 and 32, but at most
            ``output_stride``. Stages after the last requested one do not run, and features that
            are not requested cost nothing.

        Raises:
            ValueError: for a name that is not in ``FEATURES``.
        """
        if not out_features:
            return self._last_map(x)
        if unknown := [name for name in out_features if name not in FEATURES]:
            raise ValueError(f"no feature {unknown[0]!r}, there are {', '.join(FEATURES)}")
        numbers = {FEATURES.index(name) for name in out_features}
        _, taps = self._run_tapped(x, numbers, max(numbers) + 1)
        return {FEATURES[i]: tap for i, tap in taps.items()}

    def _stage_numbers(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.stages)
        chosen = count if indices is None else indices
        chosen = range(-chosen, 0) if isinstance(chosen, int) else chosen
        if not chosen or any(i not in range(-count, count) for i in chosen):
            raise ValueError(f"indices are {indices!r}, there are the stages 0 to {count - 1}")
        return [i % count for i in chosen]

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Tensor | list[Tensor]]:
        """Returns features by stage index, for timm's feature wrappers.

        Args:
            x: images (N, in_chans, H, W).
            indices: stages, negative ones counted from the end; a number n for the last n; None
                for all.
            norm: must be False, since there is no final norm.
            stop_early: do not run stages after the last index.
            output_fmt: must be "NCHW".
            intermediates_only: return only the features, without the last map.
            output_dict: return a dict with "image_features" and "image_intermediates".

        Returns:
            The map of the last stage that was run, and the list of features.

        Raises:
            ValueError: for a norm, a format or stages that ConTNet does not have.
        """
        if norm or output_fmt != "NCHW":
            raise ValueError("ConTNet has no final norm, and gives its features as NCHW only")
        numbers = self._stage_numbers(indices)
        count = max(numbers) + 1 if stop_early else len(self.stages)
        x, taps = self._run_tapped(x, numbers, count)
        intermediates = [taps[i] for i in numbers]
        if output_dict:
            result = {"image_intermediates": intermediates}
            return result if intermediates_only else {**result, "image_features": x}
        return intermediates if intermediates_only else (x, intermediates)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = None,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes the stages after the last index, and the head; returns the kept indices."""
        numbers = self._stage_numbers(indices)
        self.stages = self.stages[: max(numbers) + 1]
        if prune_head:
            self.reset_classifier(0)
        return numbers

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns logits (N, num_classes) of the last map, or the head's input (``pre_logits``)."""
        if self.global_pool == "avg":
            x = x.mean(dim=(2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (N, num_classes) of images (N, in_chans, H, W)."""
        return self.forward_head(self._last_map(x))


def create_model(name: str, num_classes: int = 1000, **options: object) -> ConTNet:
    """Builds a ConTNet with random weights.

    Args:
        name: one of ``VARIANTS``.
        num_classes: number of classes; 0 for no classifier.
        **options: keyword arguments of :class:`ConTNet`; None keeps the variant's default.

    Raises:
        ValueError: for an unknown name.
        TypeError: for an unknown option.
    """
    if name not in VARIANTS:
        raise ValueError(f"no ConTNet is called {name!r}, there are {', '.join(VARIANTS)}")
    given = {key: value for key, value in options.items() if value is not None}
    return ConTNet(**{**VARIANTS[name], "num_classes": num_classes, **given})
