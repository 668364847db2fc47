"""ConTNets with random weights, images for them, and the difference of two results."""

import torch

import contnet


def randomised(name, dtype=torch.float32, **options):
    """Returns a network whose tables and norms do not have their initial values."""
    torch.manual_seed(0)
    model = contnet.create_model(name, num_classes=10, drop_rate=0, last_drop_rate=0, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(dtype)


def images(size, batch=2, dtype=torch.float32):
    """Returns a fixed random batch."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *size, generator=generator).to(dtype)


def difference(a, b):
    """Returns the largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()
