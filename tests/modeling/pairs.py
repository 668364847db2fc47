"""Pairs of the oracle and our network, for every variant and its options, and inputs."""

import itertools
from functools import lru_cache

import torch
from oracle import VARIANTS, make_pair

NAMES = sorted(VARIANTS)
OUTPUTS = ("res2", "res3", "res4", "res5")
FLAGS = {"relative": True, "pre_norm": True, "use_avgdown": True, "qkv_bias": False}
COMBINATIONS = [
    dict(chosen)
    for n in range(len(FLAGS) + 1)
    for chosen in itertools.combinations(FLAGS.items(), n)
]
SINGLES = [{}] + [{flag: value} for flag, value in FLAGS.items()] + [FLAGS]
ODD_SIZES = [(37, 50), (256, 256), (511, 333)]
STAGE_CHANNELS = {
    "contnet_ti": (96, 192, 384, 768),
    "contnet_s": (128, 256, 512, 1024),
    "contnet_m": (128, 256, 512, 1024),
    "contnet_b": (128, 256, 512, 1024),
}
PRE_CHANNELS = {
    "contnet_ti": (48, 96, 192, 768),
    "contnet_s": (64, 128, 256, 1024),
    "contnet_m": (64, 128, 256, 1024),
    "contnet_b": (64, 128, 256, 1024),
}


def label(options):
    """Returns a readable test id."""
    return "-".join(options) or "default"


def choices(for_ti, for_s, for_m_and_b):
    """Pairs variants with options: many for the smallest network, few for the largest."""
    chosen = {"contnet_ti": for_ti, "contnet_s": for_s}
    return [(name, one) for name in NAMES for one in chosen.get(name, for_m_and_b)]


def case_label(value):
    """Returns a readable test id of a name, a tuple or options."""
    return label(value) if isinstance(value, dict) else str(value)


@lru_cache(maxsize=4)
def _cached_pair(name, ours, options):
    return make_pair(name, ours=ours, **dict(options))


def pair(name, options=None, **ours):
    """Returns a cached oracle and converted network; tests must not change them."""
    options = options or {}
    return _cached_pair(name, tuple(ours.items()), tuple(options.items()))


def image(height, width=None, batch=1, dtype=torch.float32, seed=1):
    """Returns a fixed random input."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width or height, generator=generator, dtype=dtype)


def difference(a, b):
    """Returns the largest absolute difference of two tensors of the same shape."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def randomised(name, **options):
    """Returns only our network, with the oracle's random weights."""
    oracle_options = {k: v for k, v in options.items() if k in FLAGS or k == "num_classes"}
    ours = {k: v for k, v in options.items() if k not in oracle_options}
    return make_pair(name, ours=ours, **oracle_options)[1]


def gradients(model, x, seed=0):
    """Returns gradients by name of a loss that weights every logit differently."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}
