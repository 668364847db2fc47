"""The package's reference network with random weights, and our network with the same weights."""

import torch
from torch import nn

import contnet
from contnet.checkpoint.reference_network import VARIANTS, Encoder, ReferenceNetwork

__all__ = ["VARIANTS", "Encoder", "make_oracle", "make_pair"]


def randomise(model, seed):
    """Gives every parameter and statistic a value that affects the output; zeros hide errors."""
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
    """Makes a randomised reference network in evaluation mode."""
    return randomise(ReferenceNetwork(name, **options), seed).eval()


def make_pair(name, seed=0, ours=(), **options):
    """Makes a reference network and ours with its weights; ``ours`` are options of only ours."""
    theirs = make_oracle(name, seed, **options)
    model = contnet.create_model(name, **options, **dict(ours))
    converted, _ = contnet.convert_state_dict(theirs.state_dict())
    model.load_state_dict(converted, strict=True)
    return theirs, model.eval()
