"""Tests that need a GPU: agreement with a CPU, mixed precision, CUDA graphs, training."""

import json

import pytest
import torch
from conftest import finish
from detectron2.utils.events import EventStorage
from leaves import CONFIGS, LEAVES, TINY, random_batch
from networks import difference, images, randomised

import contnet
from benchmarks.plain import run_plain
from contnet.config import load_config
from contnet.data.pipeline.loader import build_train_loader, waiting_for_batch
from contnet.modeling.build import build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture
def full_precision():
    """Turns TF32 off, which has only three digits."""
    # monkeypatch would delete cuBLAS's switch to undo it, which is not a plain attribute.
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, allowed in zip(switches, before, strict=True):
        switch.allow_tf32 = allowed


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("options", [{}, {"relative": True, "pre_norm": True}], ids="-".join)
@pytest.mark.parametrize("size", [(224, 448), (61, 90)], ids=str)
def test_forward_equals_the_cpu(size, options):
    model = randomised("contnet_s", **options).eval()
    x = images(size)
    with torch.no_grad():
        expected = model(x)
        assert difference(model.cuda()(x.cuda()).cpu(), expected) < 1e-5


def test_gradients_equal_the_plain_ones():
    model = randomised("contnet_ti", torch.float64).train().cuda()
    x = images((224, 224), dtype=torch.float64).cuda()
    taken = [
        torch.autograd.grad(run(x).square().sum(), model.parameters())
        for run in (model, lambda x: run_plain(model, x))
    ]
    for ours, plain in zip(*taken, strict=True):
        assert ((ours - plain).abs().max() / plain.abs().max().clamp(min=1e-6)).item() < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    model = randomised("contnet_ti").train().cuda()
    x = images((61, 90)).cuda()
    expected = model(x)
    with torch.autocast("cuda", dtype):
        out = model(x)
    assert difference(out.float(), expected) < 0.05
    out.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("budget", [0, 1, 1 << 30], ids=["no graph", "one graph", "all"])
def test_graphs_serve_every_shape(budget):
    model = randomised("contnet_ti").eval().cuda()
    fast = contnet.optimize_for_inference(model, max_graph_bytes=budget)
    earlier = []
    for seed, size in enumerate([(64, 64), (61, 90)] * 4):
        x = images(size).cuda() + seed
        out = fast(x)
        earlier.append((out, out.clone()))
        with torch.no_grad():
            assert difference(out, model(x)) < 1e-3
    # A replay does not change earlier outputs.
    assert all(torch.equal(out, then) for out, then in earlier)


@pytest.mark.parametrize("name", [name for name in LEAVES if "contti" in name])
def test_leaves_train_a_step_in_mixed_precision(name):
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), [*TINY, "MODEL.DEVICE", "cuda"])
    model = build_model(cfg).train()
    with EventStorage(), torch.autocast("cuda", torch.bfloat16):
        losses = model(random_batch(cfg))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()), losses
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_batches_are_pinned(imagenet_root, workers):
    options = ["MODEL.DEVICE", "cuda", "DATALOADER.NUM_WORKERS", workers]
    cfg = load_config(str(CONFIGS / "imagenet" / "contti.yaml"), options)
    dicts = [{"file_name": str(f), "label": 0} for f in imagenet_root.rglob("*.JPEG")]
    with waiting_for_batch(cfg):
        batch = next(iter(build_train_loader(cfg, dicts, seed=0)))
    assert batch.images.is_pinned() and all(image["image"].is_pinned() for image in batch)


def test_a_run_trains_evaluates_and_goes_on(train_net, tmp_path):
    options = [
        *("MODEL.DEVICE", "cuda"),
        *("SOLVER.AMP.ENABLED", "True"),
        *("LOG_PERIOD", "1"),
        *("OUTPUT_DIR", str(tmp_path)),
    ]
    leaf = f"--config-file {CONFIGS / 'faster_rcnn_contti.yaml'}"
    for start, iterations in (leaf, "4"), (f"{leaf} --resume", "6"):
        finish(train_net(start, *options, "SOLVER.MAX_ITER", iterations))
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == list(range(6))
    assert any("bbox/AP" in line for line in lines)
