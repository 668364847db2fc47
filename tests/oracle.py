"""A plain, slow ConTNet with the authors' key names, to test ours against.

Written from the published description, not from anyone's code, and kept so simple that it can be
checked by reading. Every encoder loops over its patches and attends among each patch's own tokens
by an explicit softmax; at the right and bottom margins a patch is just smaller. So nothing is ever
padded or masked, and the same code is right at every size. It has no dropout.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F

HEADS = (1, 2, 4, 8)
PATCHES = ((7, 14), (7, 14), (7, 14), (7, 7))


@dataclass(frozen=True)
class Variant:
    """Width, depth and MLP widths of one published network."""

    width: int
    blocks: tuple
    mlp: tuple
    head: int


VARIANTS = {
    "contnet_ti": Variant(48, (1, 1, 1, 1), (196, 392, 768, 768), 768),
    "contnet_s": Variant(64, (1, 1, 1, 1), (256, 512, 1024, 1024), 1024),
    "contnet_m": Variant(64, (2, 2, 2, 2), (256, 512, 1024, 1024), 1024),
    "contnet_b": Variant(64, (3, 4, 6, 3), (256, 512, 1024, 1024), 1024),
}


class Conv(nn.Module):
    """A convolution without bias under the key `conv`; `stride` can be overridden per call."""

    def __init__(self, inputs, outputs, kernel, stride=1):
        super().__init__()
        padding = kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)

    def forward(self, x, stride=None):
        return F.conv2d(x, self.conv.weight, None, stride or self.conv.stride, self.conv.padding)


class PooledConv(nn.Module):
    """The `use_avgdown` shortcut: 2x2 average pool, then a 1x1 convolution."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = Conv(inputs, outputs, 1)

    def forward(self, x, stride=2):
        if stride == 2:
            pooled = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        else:
            # Repeating the margin makes a window that hangs over it the mean of its real pixels.
            pooled = F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)
        return self.conv(pooled)


@lru_cache
def relative_position_index(patch):
    """Swin's index of token pairs into the table of relative offsets, (P*P, P*P)."""
    index = torch.zeros(patch * patch, patch * patch, dtype=torch.int64)
    for i in range(patch * patch):
        for j in range(patch * patch):
            row = i // patch - j // patch + patch - 1
            column = i % patch - j % patch + patch - 1
            index[i, j] = row * (2 * patch - 1) + column
    return index


class Attention(nn.Module):
    """Multi-head self-attention of one patch's tokens."""

    def __init__(self, dim, heads, patch, relative, qkv_bias):
        super().__init__()
        self.heads, self.patch, self.relative = heads, patch, relative
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if relative:
            offsets = (2 * patch - 1) ** 2
            self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, heads))
            index = relative_position_index(patch).clone()
            self.register_buffer("relative_position_index", index)

    def bias(self, height, width):
        """Bias (heads, h*w, h*w) of the top left corner of a patch."""
        grid = torch.arange(self.patch**2).view(self.patch, self.patch)
        tokens = grid[:height, :width].reshape(-1)
        index = self.relative_position_index[tokens][:, tokens]
        return self.relative_position_bias_table[index].permute(2, 0, 1)

    def forward(self, x, height, width):
        batch, tokens, dim = x.shape
        head_dim = dim // self.heads
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, head_dim)
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        scores = q @ k.transpose(-2, -1) / math.sqrt(head_dim)
        if self.relative:
            scores = scores + self.bias(height, width)
        out = scores.softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Encoder(nn.Module):
    """A transformer layer on every patch of a map by itself."""

    def __init__(self, dim, heads, hidden, patch, relative, pre_norm, qkv_bias):
        super().__init__()
        self.patch, self.pre_norm = patch, pre_norm
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, patch, relative, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)
        self.pe = None
        if not relative:
            rows = nn.Parameter(torch.zeros(1, patch, 1, dim // 2))
            columns = nn.Parameter(torch.zeros(1, 1, patch, dim // 2))
            self.pe = nn.ParameterList([rows, columns])

    def position(self, height, width):
        """Row table for the first half of the channels, column table for the second."""
        rows = self.pe[0][:, :height].expand(1, height, width, -1)
        columns = self.pe[1][:, :, :width].expand(1, height, width, -1)
        return torch.cat([rows, columns], dim=3)

    def encode(self, patch):
        """One patch (N, C, h, w), whole or cut short by the margin."""
        batch, dim, height, width = patch.shape
        x = patch.permute(0, 2, 3, 1)
        if self.pe is not None:
            x = x + self.position(height, width)
        x = x.reshape(batch, height * width, dim)
        if self.pre_norm:
            x = x + self.attn(self.norm1(x), height, width)
            x = x + self.mlp(self.norm2(x))
        else:
            x = self.norm1(x + self.attn(x, height, width))
            x = self.norm2(x + self.mlp(x))
        return x.reshape(batch, height, width, dim).permute(0, 3, 1, 2)

    def forward(self, x):
        p = self.patch
        height, width = x.shape[-2:]
        rows = []
        for i in range(0, height, p):
            row = [self.encode(x[:, :, i : i + p, j : j + p]) for j in range(0, width, p)]
            rows.append(torch.cat(row, dim=3))
        return torch.cat(rows, dim=2)


class Block(nn.Module):
    """Norm, ReLU, two encoders, a convolution and a shortcut."""

    def __init__(self, stage, variant, is_last, relative, pre_norm, use_avgdown, qkv_bias):
        super().__init__()
        dim, hidden, heads = variant.width * 2**stage, variant.mlp[stage], HEADS[stage]
        self.bn = nn.BatchNorm2d(dim)
        for name, patch in zip(("ste1", "ste2"), PATCHES[stage], strict=True):
            encoder = Encoder(dim, heads, hidden, patch, relative, pre_norm, qkv_bias)
            self.add_module(name, encoder)
        self.downsample = None
        if not is_last:
            self.out_conv = Conv(dim, dim, 3)
            return
        out = variant.head if stage == 3 else 2 * dim
        stride = 1 if stage == 3 else 2
        self.out_conv = Conv(dim, out, 1 if stage == 3 else 3, stride)
        if use_avgdown and stage < 3:
            self.downsample = PooledConv(dim, out)
        else:
            self.downsample = Conv(dim, out, 1, stride)

    def encoded(self, x):
        """The activated map and what the two encoders make of it."""
        activated = F.relu(self.bn(x))
        return activated, self.ste2(self.ste1(activated))

    def forward(self, x):
        activated, encoded = self.encoded(x)
        shortcut = x if self.downsample is None else self.downsample(activated)
        return self.out_conv(encoded) + shortcut

    def dense(self, x):
        """The same at stride 1: `forward(x)` equals `dense(x)[..., ::2, ::2]`."""
        activated, encoded = self.encoded(x)
        return self.out_conv(encoded, stride=1) + self.downsample(activated, stride=1)


class Oracle(nn.Module):
    """ConTNet by the authors' key names."""

    def __init__(
        self,
        name,
        num_classes=1000,
        relative=False,
        pre_norm=False,
        use_avgdown=False,
        qkv_bias=True,
    ):
        super().__init__()
        variant = VARIANTS[name]
        self.layer0 = nn.ModuleDict({"conv": Conv(3, variant.width, 7, 2)})
        for stage, depth in enumerate(variant.blocks):
            layer = nn.ModuleDict()
            for i in range(depth):
                is_last = i == depth - 1
                options = (relative, pre_norm, use_avgdown, qkv_bias)
                layer[f"ConTBlock{i}"] = Block(stage, variant, is_last, *options)
            self.add_module(f"layer{stage + 1}", layer)
        self.fc = nn.Linear(variant.head, num_classes)

    def stem(self, x):
        """7x7 stride 2 convolution, then 3x3 stride 2 max-pool."""
        return F.max_pool2d(self.layer0["conv"](x), 3, 2, 1)

    def layers(self):
        """The four stages, each a list of blocks."""
        return [list(getattr(self, f"layer{i}").values()) for i in (1, 2, 3, 4)]

    def forward(self, x):
        """Logits."""
        x = self.stem(x)
        for blocks in self.layers():
            for block in blocks:
                x = block(x)
        return self.fc(x.mean((2, 3)))

    def features(self, x, taps="stage"):
        """Maps res2..res5 at strides 4, 8, 16, 32."""
        x, maps = self.stem(x), {}
        for stage, blocks in enumerate(self.layers()):
            for block in blocks[:-1]:
                x = block(x)
            last, tap = blocks[-1], f"res{stage + 2}"
            if stage == 3:
                maps[tap] = last(x)
                return maps
            maps[tap] = last.dense(x) if taps == "stage" else last.encoded(x)[1]
            x = last(x)


def randomise(model, seed):
    """Give every parameter and statistic a value that shows in the output; zeros hide errors."""
    generator = torch.Generator().manual_seed(seed)
    norms = (nn.LayerNorm, nn.BatchNorm2d)
    with torch.no_grad():
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                if isinstance(module, norms) and name == "weight":
                    value.uniform_(0.5, 1.5, generator=generator)
                elif isinstance(module, nn.Linear | nn.Conv2d) and name == "weight":
                    scale = value[0].numel() ** -0.5
                    value.normal_(0, scale, generator=generator)
                else:
                    value.normal_(0, 0.3, generator=generator)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                module.num_batches_tracked.fill_(7)
    return model


def make_oracle(name, seed=0, **options):
    """A randomised oracle in evaluation mode."""
    return randomise(Oracle(name, **options), seed).eval()


def make_pair(name, seed=0, ours=(), **options):
    """An oracle and our network with its converted weights; `ours` are options only we have."""
    import contnet

    theirs = make_oracle(name, seed, **options)
    model = contnet.create_model(name, **options, **dict(ours))
    converted, _ = contnet.convert_state_dict(theirs.state_dict())
    model.load_state_dict(converted, strict=True)
    return theirs, model.eval()
