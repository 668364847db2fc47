"""Tests that the simulated GPU of marked_devices.py accepts and refuses the same as a GPU."""

import copy
import io

import pytest
import torch
from marked_devices import FLOAT32_ON_GPU, pretended_gpu
from torch import nn
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def gpu():
    with pretended_gpu():
        yield


def square(device="cuda"):
    return torch.ones(3, 3, device=device)


def index(device):
    return torch.tensor([0, 2], device=device)


def gradient_of_another_device():
    x = square().requires_grad_()
    y = x * x
    y.register_hook(lambda gradient: torch.ones(3, 3))
    (y * y).sum().backward()


def step_of_a_gradient_on_the_cpu():
    x = nn.Parameter(square())
    x.grad = square("cpu")
    torch.optim.SGD([x], lr=1).step()


REFUSED = {
    "sum": lambda: square() + square("cpu"),
    "in place": lambda: square().add_(square("cpu")),
    "into a number": lambda: torch.tensor(1.0).add_(square()),
    "a number of the GPU": lambda: square("cpu") + torch.tensor(1.0, device="cuda"),
    "concatenation": lambda: torch.cat([square(), square("cpu")]),
    "stack of numbers": lambda: torch.stack([torch.tensor(1.0), torch.tensor(1.0).cuda()]),
    "view": lambda: square()[1:].t() @ square("cpu")[1:],
    "module on the CPU": lambda: nn.Linear(3, 3)(square()),
    "buffer on the CPU": lambda: F.batch_norm(square(), torch.zeros(3), torch.ones(3)),
    "input on the CPU": lambda: nn.Linear(3, 3).cuda()(square("cpu")),
    "created on the CPU": lambda: square() * torch.arange(3),
    "from NumPy": lambda: square() * torch.from_numpy(square("cpu").numpy()),
    "moved back": lambda: square() + square().cpu(),
    "indices of the GPU": lambda: square("cpu")[index("cuda")],
    "mask of the GPU": lambda: square("cpu")[square() > 0],
    "values of the CPU": lambda: square().index_put_((index("cpu"),), torch.ones(2, 3)),
    "gather": lambda: square().gather(0, index("cpu")[None]),
    "gradient": gradient_of_another_device,
    "optimiser": step_of_a_gradient_on_the_cpu,
    "mask": lambda: F.scaled_dot_product_attention(
        *[square()[None, None]] * 3, attn_mask=square("cpu")
    ),
    "nms": lambda: torch.ops.torchvision.nms(torch.ones(2, 4).cuda(), torch.ones(2), 0.5),
}
TAKEN = {
    "number": lambda: square() + torch.tensor(1.0) * 2 + 1,
    "view": lambda: square()[1:].t() @ square()[1:],
    "module": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to("cuda")(square()),
    "like": lambda: square() + torch.zeros_like(square()) + square().new_tensor([1.0, 2.0, 3.0]),
    "device of another": lambda: square() + torch.arange(3, device=square().device),
    "moved": lambda: square() + square("cpu").to(square()) + square("cpu").cuda(),
    "indices": lambda: square()[index("cpu")] + square()[index("cuda")],
    "mask": lambda: square()[square("cpu") > 0],
    "values": lambda: square().index_put_((index("cpu"),), torch.tensor(1.0)),
    "copy": lambda: square().copy_(square("cpu")),
    "written": lambda: square().fill_(torch.tensor(1.0)),
    "deep copy": lambda: copy.deepcopy(nn.Linear(3, 3).cuda())(square()),
    "shares": lambda: nn.Linear(3, 3, device="cuda").weight.detach().untyped_storage(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(what):
    with pytest.raises(RuntimeError, match="has tensors on cuda:0, and one on the CPU of shape"):
        REFUSED[what]()


@pytest.mark.parametrize("what", TAKEN)
def test_it_takes(what):
    assert TAKEN[what]().device == torch.device("cuda", 0)


def test_what_is_on_the_cpu_stays_there():
    assert square("cpu").device.type == "cpu" and not (square("cpu") + square().cpu()).is_cuda
    moved = square("cpu")
    assert moved.cuda() is not moved and not moved.is_cuda
    on_gpu = square()
    assert on_gpu.cpu() is not on_gpu and on_gpu.cuda() is on_gpu and on_gpu.is_cuda
    assert square("cpu").copy_(on_gpu).device.type == "cpu"
    with pytest.raises(TypeError, match="cuda:0"):
        on_gpu.numpy()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_stays_on_the_gpu(optimizer):
    model = nn.Linear(3, 3).cuda()
    step = optimizer(model.parameters(), lr=0.1)
    model(square()).sum().backward()
    assert model.weight.grad.is_cuda
    step.step()
    states = [value for state in step.state.values() for value in state.values()]
    assert all(value.is_cuda for value in states if value is not None and value.dim())


def test_functions_of_ones_own_see_the_gpu_in_the_backward_pass():
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            seen.extend([ctx.saved_tensors[0].device.type, gradient.device.type])
            return 2 * gradient

    Double.apply(square().requires_grad_()).sum().backward()
    assert seen == ["cuda", "cuda"]


def test_files_name_the_gpu():
    file = io.BytesIO()
    torch.save({"weight": square(), "other": square("cpu")}, file)
    file.seek(0)
    places = []
    torch.load(file, map_location=lambda storage, place: places.append(place) or storage)
    assert sorted(places) == ["cpu", "cuda:0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_on_a_gpu(dtype):
    model, norm = nn.Linear(3, 3).cuda(), nn.LayerNorm(3).cuda()
    with torch.autocast("cuda", dtype):
        y = model(square())
        assert y.dtype == dtype and y.relu().dtype == dtype
        assert norm(y).dtype == y.sum().dtype == y.softmax(1).dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert model(square()).dtype == torch.float32
    assert norm(model(square())).is_cuda and y.is_cuda
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    assert scaler.scale(square()).sum() == 36 and scaler.is_enabled()


def test_the_list_for_autocast_is_a_gpus():
    known = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    assert {f"aten::{name}" for name in FLOAT32_ON_GPU} <= set(known)
