"""Tests the memory layout of a model where it is built."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from leaves import CONFIGS, TINY, random_batch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import contnet
from contnet.config import load_config
from contnet.modeling.build import build_model, set_attention_kernels, use_channels_last

SYSTEMS = [
    "faster_rcnn_contti",
    "retinanet_contti",
    "fcos_contti",
    "cityscapes/pspnet_contti",
    "imagenet/contti",
]


def build_tiny(name):
    """Returns a system's config and model."""
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), TINY)
    return cfg, build_model(cfg)


@pytest.mark.parametrize("name", SYSTEMS)
def test_gradients_lie_as_their_weights_do(name):
    """Otherwise, DistributedDataParallel warns: without the conversion, of ConTNet's shortcuts."""
    cfg, model = build_tiny(name)
    use_channels_last(model)
    with EventStorage():
        sum(model(random_batch(cfg)).values()).backward()
    trained = {k: p for k, p in model.named_parameters() if p.grad is not None}
    assert any(p.stride()[1] == 1 and p.shape[1] > 1 for p in trained.values() if p.dim() == 4)
    assert [k for k, p in trained.items() if p.grad.stride() != p.stride()] == []


def test_only_convolutions_change():
    _, model = build_tiny("imagenet/contti")
    before = {name: (p.stride(), p.clone()) for name, p in model.named_parameters()}
    use_channels_last(model)
    changed = {name for name, p in model.named_parameters() if p.stride() != before[name][0]}
    convolutions = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.weight.shape[1] > 1
    }
    assert changed == convolutions
    assert all(p.equal(before[name][1]) for name, p in model.named_parameters())


def test_a_cpus_model_stays_as_it_is():
    _, model = build_tiny("cityscapes/pspnet_contti")
    assert all(p.is_contiguous() for p in model.parameters())
    assert all(p.stride()[-1] == 1 for p in model.parameters() if p.dim() == 4)


@pytest.mark.parametrize(
    ("choice", "allowed"),
    [
        ("auto", {"flash", "mem_efficient", "cudnn"}),
        ("flash", {"flash", "mem_efficient"}),
        ("efficient", {"mem_efficient"}),
        ("cudnn", {"cudnn"}),
        ("math", set()),
    ],
)
def test_kernels_of_attention(choice, allowed):
    cuda = torch.backends.cuda
    kernels = ("flash", "mem_efficient", "cudnn")

    def enabled():
        return {kernel for kernel in kernels if getattr(cuda, f"{kernel}_sdp_enabled")()}

    def allow(names):
        for kernel in kernels:
            getattr(cuda, f"enable_{kernel}_sdp")(kernel in names)

    before = enabled()
    allow(kernels)
    try:
        set_attention_kernels(choice)
        assert enabled() == allowed and cuda.math_sdp_enabled()
    finally:
        allow(before)


class Products(TorchDispatchMode):
    """Records shapes of matrix products, with attention computed as two products per sequence."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ == "bmm":
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


def test_a_gpu_attends_in_no_more_patches_than_its_kernels_take():
    model = contnet.create_model("contnet_ti").eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Products() as products:
        state = {k: torch.empty_like(v, device="cuda") for k, v in model.state_dict().items()}
        images = torch.empty(1100, 3, 224, 224, device="cuda")
        output = torch.func.functional_call(model, state, (images,))
    assert output.shape == (1100, 1000)
    # Patches times heads of the four stages; in the last one, both encoders have 49 tokens.
    sequences = 1100 * (64 * 1 + 16 * 2 + 4 * 4 + 1 * 8 * 2)
    assert sum(shape[0] for shape in products.shapes if shape[1:] == (49, 48)) == sequences
    assert max(shape[0] for shape in products.shapes) <= 65_535
